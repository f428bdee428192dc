"""`python -m pretrain_xla doctor`: check this machine, measure it, and record that for preflight.

Exit status: 0 all is well, 1 a check failed, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain_xla.command_line import Parser
from pretrain_xla.config import LEAVES, RunConfig
from pretrain_xla.doctor.agreement import local_facts
from pretrain_xla.doctor.check import Check, failed, skipped
from pretrain_xla.doctor.client import Answer, ask
from pretrain_xla.doctor.examination import Machine, device_checks, this_machine
from pretrain_xla.doctor.record import calibration_of
from pretrain_xla.doctor.render import render, summary, to_tree
from pretrain_xla.doctor.storage import check_storage
from pretrain_xla.doctor.verdicts import judge_steps
from pretrain_xla.doctor.versions import check_versions, software
from pretrain_xla.errors import UserError
from pretrain_xla.flags import parse_flags
from pretrain_xla.interop.from_checkpoint import resolve_architecture
from pretrain_xla.preflight.calibration import FOLDER, calibration_path, read_calibration, write_calibration
from pretrain_xla.preflight.command import compilable
from pretrain_xla.preflight.render import console
from pretrain_xla.preflight.report import Report
from pretrain_xla.preflight.trials import Compiler
from pretrain_xla.run_folder.metrics import to_json

PROGRAM = "python -m pretrain_xla doctor"
DESCRIPTION = """Check this machine: versions that fit together, hosts that agree, devices, kernels against the reference, disk
and buckets. Measure a matrix product, a pass over memory and each collective against the table of chips, and with --config some
steps of that run against preflight's estimate. Writes what it measured to calibration/<chip>.json, which preflight reads. On a
slice of several hosts, start it on all of them at once. Accepts all flags of `train` too."""
LEAST_STEPS = 15
WELL, ILL = 0, 1


def doctor_command(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status.

    Raises:
        UserError: the request is wrong.
    """
    own, rest = _own_flags(arguments)
    parsed = parse_flags(rest, program=PROGRAM, description=DESCRIPTION, build=resolve_architecture)
    has_file = any(word.partition("=")[0] == "--config" for word in rest)
    is_named = has_file or any(LEAVES[leaf] in ("model", "train") for leaf in parsed.given)
    return examine(own, parsed.config, makes_steps=is_named and own.steps > 0)


def examine(own: argparse.Namespace, config: RunConfig, *, makes_steps: bool) -> int:
    """Make all checks, print them, and write the calibration; returns the exit status."""
    progress = _Progress()
    versions, machine = software(), this_machine(config)
    checks = [check_versions(versions, config.parallel.runtime)]
    for where in dict.fromkeys([".", *own.storage]):
        progress.show(f"storage {where}")
        checks.append(check_storage(where, own.storage_mib * 2**20))
    answer = _ask_devices(own, config, machine, versions, checks, progress)
    machine = machine.seen(answer)
    checks += device_checks(answer, machine)
    is_first = answer.figures.get("hosts", {}).get("index", 0) == 0
    if not makes_steps:
        checks.append(skipped("steps", "no run was named", f"add --config FILE to make {own.steps or 30} steps of it"))
    elif "devices" not in answer.figures:
        checks.append(skipped("steps", "the devices could not be opened", "see above"))
    else:
        # The steps first: the other hosts would wait for the first one's compilation.
        made = _ask_steps(own, config, progress)
        estimate = _estimate(config, machine, checks, progress) if is_first else None
        checks.append(_judge_steps(own, made, machine, estimate))
    progress.end()
    file = None
    if own.calibration and is_first:
        file = _record(own.calibration, checks, machine, versions, config if makes_steps else None)
    _print(own, checks, versions, machine, file)
    return ILL if any(check.status == "failed" for check in checks) else WELL


def _own_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--storage",
        action="append",
        default=[],
        metavar="URL",
        help="folder or bucket (gs://bucket/folder, s3://…) whose write and read rate is measured, besides the current folder; "
        "repeatable",
    )
    parser.add_argument(
        "--storage-mib", type=int, default=256, metavar="N", help="size of the file written there (default: 256 MiB)"
    )
    parser.add_argument(
        "--steps", type=int, default=30, metavar="N", help="steps of the named run (default: 30); 0 makes none"
    )
    parser.add_argument(
        "--host-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="several hosts: how long to wait for the others (default: 120)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="end a process that opens the devices after so long; must be longer than the compilation (default: 1800)",
    )
    parser.add_argument(
        "--calibration",
        default=FOLDER,
        metavar="FOLDER",
        help=f"folder to write what was measured to (default: {FOLDER}); '' writes nothing",
    )
    parser.add_argument("--json", action="store_true", help="print only a JSON document to stdout")
    own, rest = parser.parse_known_args(list(arguments))
    if own.storage_mib < 1:
        raise UserError(f"--storage-mib {own.storage_mib}: at least 1 is needed")
    if 0 < own.steps < LEAST_STEPS or own.steps < 0:
        raise UserError(f"--steps {own.steps}: at least {LEAST_STEPS} are needed, or 0 for none")
    for flag in ("host_seconds", "timeout"):
        if getattr(own, flag) <= 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(own, flag):g}: must be positive")
    return own, rest


def _ask_devices(
    own: argparse.Namespace,
    config: RunConfig,
    machine: Machine,
    versions: dict[str, str],
    checks: Sequence[Check],
    progress: _Progress,
) -> Answer:
    parallel = config.parallel
    failures = [check.name for check in checks if check.status == "failed"]
    request: dict[str, Any] = {
        "job": "devices",
        "parallel": {"runtime": parallel.runtime, "device": parallel.device, "host_timeout": parallel.host_timeout},
        "chip": machine.chip.name if machine.chip else None,
        "host_seconds": own.host_seconds,
        "facts": local_facts(versions, failures, chip=machine.name, local_devices=machine.chips_on_bus),
    }
    return ask(request, own.timeout, progress.show)


def _estimate(config: RunConfig, machine: Machine, checks: list[Check], progress: _Progress) -> Report | None:
    """Preflight's report on the run, and a check that says whether there is one."""
    if machine.topology is None:
        why = "this is no TPU" if machine.kind != "TPU" else "this host does not say which slice it is part of"
        checks.append(skipped("preflight", why, "name a slice with --topology, as v5e-8, to have its estimate beside"))
        return None
    if config.parallel.runtime == "torch":
        checks.append(skipped("preflight", "it estimates runs with --runtime xla", "leave out --runtime torch"))
        return None
    progress.end()
    try:
        with Compiler(machine.topology) as compiler:
            report = compiler.compile(compilable(config, machine.topology), "the step")
    except UserError as error:
        checks.append(failed("preflight", str(error), "fix that; python -m pretrain_xla preflight shows it alone"))
        return None
    if report.fits:
        found = f"compiled for {machine.topology.name} in {report.compile_seconds:.0f} s, and it fits"
        checks.append(Check("preflight", "ok", found))
    else:
        found, fix = (
            f"the step does not fit {machine.topology.name}",
            "python -m pretrain_xla preflight tries what would",
        )
        checks.append(failed("preflight", found, fix))
    return report


def _ask_steps(own: argparse.Namespace, config: RunConfig, progress: _Progress) -> Answer:
    request = {
        "job": "steps",
        "config": config.model_dump(mode="json"),
        "steps": own.steps,
        "host_seconds": own.host_seconds,
    }
    return ask(request, own.timeout, progress.show)


def _judge_steps(own: argparse.Namespace, answer: Answer, machine: Machine, estimate: Report | None) -> Check:
    if "steps" in answer.figures:
        return judge_steps(answer.figures["steps"], estimate, machine.is_of(estimate))
    error = answer.errors.get("steps") or (answer.broken or ("", "no answer"))[1]
    fix = "python -m pretrain_xla preflight says whether it fits and what would; else fix what it says"
    return failed(f"{own.steps} steps", error, fix)


def _record(
    folder: str, checks: list[Check], machine: Machine, versions: dict[str, str], config: RunConfig | None
) -> str | None:
    """Write the calibration, and add a check that says so; returns its path."""
    where = str(calibration_path(folder, machine.name))
    try:
        earlier = read_calibration(folder, machine.name) if Path(where).exists() else None
    except UserError:  # damaged, and about to be replaced
        earlier = None
    same = any(check.figures.get("same_chip") for check in checks)
    found = calibration_of(checks, chip=machine.name, software=versions, config=config, same_chip=same, earlier=earlier)
    if found is None:
        checks.append(skipped("calibration", "what fails is not recorded", "fix what failed above"))
        return None
    try:
        write_calibration(folder, found)
    except UserError as error:
        checks.append(failed("calibration", str(error), "name a folder that you may write to with --calibration"))
        return None
    said = "preflight reads it" if found.step is not None and found.step.ratio is not None else "rates only"
    checks.append(Check("calibration", "ok", f"written to {where} ({said})"))
    return where


def _print(
    own: argparse.Namespace, checks: Sequence[Check], versions: dict[str, str], machine: Machine, file: str | None
) -> None:
    if own.json:
        print(to_json(to_tree(checks, versions, machine.name, file), indent=2))
        return
    console().print(render(checks))
    console().print(summary(checks))


@dataclasses.dataclass
class _Progress:
    """What is being done: one live line on a terminal, else a line for each, on stderr."""

    stage: str = ""

    def show(self, stage: str) -> None:
        """Say what begins, once."""
        if stage == self.stage:
            return
        self.stage = stage
        if stage == "done":
            return
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        print(f"\r\x1b[K{stage} …" if live else f"{stage} …", end="" if live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Remove the live line."""
        if sys.stderr.isatty() and self.stage:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self.stage = ""
