"""The process that opens the devices: `python -m pretrain_xla.doctor.worker FOLDER`, started by `client.py`.

A TPU belongs to one process at a time, and a broken one may hang or kill it: so each job has its own process, and what is
finished is written at once. FOLDER holds `request.json`; `stage` has the present stage; `results.jsonl` has one line for each
that is finished: {"stage", "figures"} or {"stage", "error"}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain_xla.doctor.check import Figures
from pretrain_xla.errors import AnotherFailed, UserError, missing_package
from pretrain_xla.system_faults import memory_fault, reason


class Recorder:
    """Writes what is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stage(self, name: str) -> None:
        """Say what begins; the process that waits may read at any time."""
        new = self._folder / "stage.tmp"
        new.write_text(name, encoding="utf-8")
        new.replace(self._folder / "stage")

    def run(self, stage: str, measure: Callable[[], Figures]) -> bool:
        """Make one stage and record its figures or its error; returns whether it went well."""
        self.stage(stage)
        try:
            self._write({"stage": stage, "figures": measure()})
            return True
        except (UserError, AnotherFailed) as error:
            self._write({"stage": stage, "error": str(error)})
        except ModuleNotFoundError as error:
            self._write({"stage": stage, "error": missing_package(error) or str(error)})
        except Exception as error:  # a device's or a compiler's, of any type
            text = memory_fault(error) or f"{type(error).__name__}: {reason(error)}"
            self._write({"stage": stage, "error": text[:600]})
        return False

    def _write(self, line: dict[str, Any]) -> None:
        with (self._folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def work(folder: Path) -> None:
    """Do the job in a folder."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    recorder = Recorder(folder)
    if request["job"] == "devices":
        examine_devices(request, recorder)
    else:
        make_steps(request, recorder, folder)
    recorder.stage("done")


def examine_devices(request: dict[str, Any], recorder: Recorder) -> None:
    """Meet the other hosts, open the devices, and measure them."""

    def load() -> Figures:
        """Import what touches libraries: where versions do not fit, that ends here, or ends the process."""
        from pretrain_xla.config import build_config
        from pretrain_xla.runtime import load_xla

        if request["parallel"]["runtime"] == "xla":
            load_xla(build_config({"parallel": request["parallel"]}, "doctor"))
        return {}

    if not recorder.run("start", load):
        return
    from pretrain_xla.config import build_config
    from pretrain_xla.doctor.agreement import gather_facts
    from pretrain_xla.runtime import Hosts, join_hosts, start
    from pretrain_xla.runtime.bench_sizes import COLLECTIVES

    config = build_config({"parallel": request["parallel"]}, "doctor")
    seconds = request["host_seconds"]
    met: list[Hosts] = []

    def meet() -> Figures:
        hosts = join_hosts(config, seconds)
        met.append(hosts)
        return {
            "facts": gather_facts(hosts, request["facts"], seconds),
            "machines": hosts.machines,
            "index": hosts.index,
        }

    if not recorder.run("hosts", meet):
        return
    bench: list[Any] = []

    def open_devices() -> Figures:
        runtime = start(config, met[0])
        if runtime.name == "xla":
            from pretrain_xla.runtime.xla.device_bench import XlaBench

            bench.append(XlaBench())
        else:
            from pretrain_xla.doctor.torch_bench import TorchBench

            bench.append(TorchBench(runtime.device))
        return bench[0].devices() | {"name": runtime.device_name}

    if not recorder.run("devices", open_devices):
        return
    hosts = met[0]
    programs: list[tuple[str, Callable[[], Figures]]] = [
        ("kernels", lambda: _kernels(request, bench[0])),
        ("matmul", bench[0].matmul),
        ("stream", bench[0].stream),
    ]
    if request["parallel"]["runtime"] == "xla":
        programs += [(kind, functools.partial(bench[0].collective, kind)) for kind in COLLECTIVES]
    for stage, measure in programs:
        if not recorder.run(stage, measure) and hosts.count > 1:
            # The others may be in a program that waits for this host's devices.
            hosts.fail(f"{hosts.name(hosts.index)} failed at {stage}", 1)
            return
    hosts.close()


def _kernels(request: dict[str, Any], bench: Any) -> Figures:
    from pretrain_xla.doctor.kernels import compare, model_of, torch_subject, xla_subject

    model = model_of(bench.sizes.tokens)
    if request["parallel"]["runtime"] == "torch":
        return compare(torch_subject(model, bench.device), model)
    return compare(xla_subject(model, request["chip"], bench), model)


def make_steps(request: dict[str, Any], recorder: Recorder, folder: Path) -> None:
    """Make some steps of the run."""
    from pretrain_xla.config import RunConfig
    from pretrain_xla.doctor.steps import measure_steps, short_run, write_tokens
    from pretrain_xla.runtime import join_hosts

    def steps() -> Figures:
        config = short_run(RunConfig.model_validate(request["config"]), request["steps"], str(folder))
        write_tokens(config, str(folder), request["steps"])
        with join_hosts(config, request["host_seconds"]) as hosts:
            return measure_steps(config, request["steps"], hosts)

    recorder.run("steps", steps)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    sys.stdout.flush()
    # Exit at once, as preflight's worker does: what is finished is written.
    os._exit(0)
