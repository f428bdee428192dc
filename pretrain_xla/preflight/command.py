"""`python -m pretrain_xla preflight`: compile the training step for a TPU, without one.

Exit status: 0 it fits, 1 it does not, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain_xla.command_line import Parser
from pretrain_xla.config import RunConfig
from pretrain_xla.config_file import to_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.flags import parse_flags
from pretrain_xla.interop.from_checkpoint import resolve_architecture
from pretrain_xla.preflight.calibration import FOLDER
from pretrain_xla.preflight.render import console, render
from pretrain_xla.preflight.search import Search
from pretrain_xla.preflight.suggestions import suggest
from pretrain_xla.preflight.tables import comparison, trials_table
from pretrain_xla.preflight.topology import Topology, chosen_topology
from pretrain_xla.preflight.trials import Compiler, Trial, changed

PROGRAM = "python -m pretrain_xla preflight"
DESCRIPTION = """Compile the training step with the TPU compiler, without a TPU, and report whether it fits in HBM, how long
a step takes, where the time goes and what the run costs. Accepts all flags of `train` too, such as --config FILE,
--topology v5e-8 (or v3-8, v4-32, v5p-128, v6e-8, v5e:2x4 …) and --train-batch-size 64."""
FITS, TOO_LARGE = 0, 1


def preflight_command(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status.

    Raises:
        UserError: the request is wrong, or the compiler is not installed.
    """
    own, rest = _own_flags(arguments)
    if own.compare:
        configs = [_config([*rest, "--config", file]) for file in own.compare]
        return _compare(own, configs)
    config = _config(rest)
    if own.search:
        source = next((a for b, a in itertools.pairwise(rest) if b == "--config"), None)
        return _search(own, config, Path(source) if source else None)
    return preflight(config, own)


def preflight(config: RunConfig, own: argparse.Namespace | None = None) -> int:
    """Report on one configuration; returns the exit status. own: the command's flags. None means their defaults."""
    own = own or _own_flags([])[0]
    topology = chosen_topology(config.parallel.topology)
    config = compilable(config, topology)
    tried: list[Trial] = []
    with _compiler(own, topology) as compiler:
        report = compiler.compile(config, save=own.save_hlo)
        if not own.json:
            console().print(render(report))
        if not report.fits and not own.no_suggestions:
            tried = suggest(config, report, compiler)
    if own.json:
        _print_json(report.to_tree() | {"suggestions": [_trial_tree(trial) for trial in tried]})
    elif tried:
        best = max((trial for trial in tried if trial.fits), key=lambda trial: trial.tokens_per_second, default=None)
        console().print(trials_table("what would fit, each tried by compiling", tried, best))
    return FITS if report.fits else TOO_LARGE


def compilable(config: RunConfig, topology: Topology) -> RunConfig:
    """The config as the trainer would run it on that slice: through XLA, and as one program over all devices."""
    # With one process per device the step is the same, and the same collective reduces its gradients.
    return changed(config, {"runtime": "xla", "mp_start_method": None, "topology": topology.name})


def _own_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--price-per-chip-hour",
        type=float,
        metavar="DOLLARS",
        help="price of one chip, to estimate the cost of the run",
    )
    parser.add_argument("--search", action="store_true", help="find the fastest configuration that fits, by compiling")
    parser.add_argument(
        "--max-compiles",
        type=int,
        default=12,
        metavar="N",
        help="--search: maximum number of compilations (default: 12)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="--search: file to write the best configuration to")
    parser.add_argument("--compare", nargs=2, metavar=("A.yaml", "B.yaml"), help="compare two configurations")
    parser.add_argument(
        "--no-suggestions", action="store_true", help="if the step does not fit, do not search for settings that fit"
    )
    parser.add_argument("--json", action="store_true", help="print only a JSON document to stdout")
    parser.add_argument(
        "--save-hlo", type=Path, metavar="DIR", help="save the program before and after compilation in this folder"
    )
    parser.add_argument(
        "--compiler-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option for the TPU compiler; repeatable",
    )
    parser.add_argument(
        "--calibration",
        default=FOLDER,
        metavar="FOLDER",
        help=f"folder with what `doctor` has measured on TPUs, by which the estimate is scaled (default: {FOLDER}); "
        "'' reads none",
    )
    own, rest = parser.parse_known_args(list(arguments))
    if own.price_per_chip_hour is not None and own.price_per_chip_hour < 0:
        raise UserError(f"--price-per-chip-hour {own.price_per_chip_hour}: must not be negative")
    if own.max_compiles < 1:
        raise UserError(f"--max-compiles {own.max_compiles}: at least 1 is needed")
    for option in own.compiler_option:
        if "=" not in option:
            raise UserError(f"--compiler-option {option}: write it as NAME=VALUE")
    return own, rest


def _config(arguments: Sequence[str]) -> RunConfig:
    return parse_flags(arguments, program=PROGRAM, description=DESCRIPTION, build=resolve_architecture).config


def _compiler(own: argparse.Namespace, topology: Topology, total: int = 1) -> Compiler:
    options = dict(option.split("=", 1) for option in own.compiler_option)
    price, folder = own.price_per_chip_hour, own.calibration or None
    return Compiler(topology, options=options, price_per_chip_hour=price, calibration=folder, total=total)


def _compare(own: argparse.Namespace, configs: list[RunConfig]) -> int:
    reports = []
    for config, file in zip(configs, own.compare, strict=True):
        topology = chosen_topology(config.parallel.topology)
        with _compiler(own, topology) as compiler:
            save = own.save_hlo / Path(file).stem if own.save_hlo else None
            reports.append(compiler.compile(compilable(config, topology), file, save))
    if own.json:
        _print_json({file: report.to_tree() for file, report in zip(own.compare, reports, strict=True)})
    else:
        console().print(comparison([Path(file).stem for file in own.compare], reports))
    return FITS if all(report.fits for report in reports) else TOO_LARGE


def _search(own: argparse.Namespace, config: RunConfig, source: Path | None) -> int:
    topology = chosen_topology(config.parallel.topology)
    config = compilable(config, topology)
    stopped = ""
    with _compiler(own, topology, own.max_compiles) as compiler:
        search = Search(config, compiler, own.max_compiles)
        try:
            search.run()
        except KeyboardInterrupt:
            stopped = " (stopped: found so far)"
    best = search.best
    output = own.output or Path(f"{source.stem if source else 'preflight'}-{topology.name.replace(':', '-')}.yaml")
    if own.json:
        trials = [_trial_tree(trial) for trial in search.tried]
        _print_json(
            {"tried": trials, "best": _trial_tree(best) if best else None, "output": str(output) if best else None}
        )
    else:
        console().print(trials_table(f"tried for {topology.name}{stopped}", search.tried, best))
    if best is None:
        return TOO_LARGE
    _write_best(output, config, best, topology)
    if not own.json:
        console().print(f"best: {best.label}\nwritten to {output}: start it with --config {output}", markup=False)
    return FITS


def _write_best(output: Path, config: RunConfig, best: Trial, topology: Topology) -> None:
    assert best.report is not None
    assert best.report.estimate is not None
    header = (
        f"# Found by `{PROGRAM} --search` for {topology.name}: {best.label}\n"
        f"# Estimates: {best.report.estimate.conservative.tokens_per_second:,.0f} tokens/s, "
        f"{best.report.memory.total / best.report.memory.capacity:.0%} of HBM\n"
    )
    try:
        output.write_text(header + to_yaml(changed(config, best.changes)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}): name another file") from None


def _trial_tree(trial: Trial) -> dict[str, Any]:
    report = trial.report.to_tree() if trial.report else None
    return {"changes": trial.changes, "fits": trial.fits, "error": trial.error, "report": report}


def _print_json(tree: dict[str, Any]) -> None:
    print(json.dumps(tree, indent=2))
