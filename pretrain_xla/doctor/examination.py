"""Which machine this is, and the checks of its devices from what their process answered."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from pretrain_xla.config import RunConfig
from pretrain_xla.doctor.agreement import check_hosts
from pretrain_xla.doctor.check import Check, Figures, failed, skipped
from pretrain_xla.doctor.client import Answer
from pretrain_xla.doctor.verdicts import (
    SEND,
    TPU_TAKEN,
    judge_collective,
    judge_devices,
    judge_kernels,
    judge_matmul,
    judge_stream,
)
from pretrain_xla.errors import UserError
from pretrain_xla.preflight.report import Report
from pretrain_xla.preflight.topology import Topology, resolve_topology
from pretrain_xla.runtime.bench_sizes import COLLECTIVES
from pretrain_xla.runtime.chips import CHIPS, Chip
from pretrain_xla.runtime.peak_flops import gpu_peak
from pretrain_xla.runtime.tpu_chip import accelerator_type, find_chip, pci_chips

FIXES = {
    "start": "see that `python -c 'import torch_xla'` works; else install the versions above again",
    "hosts": "start the same command on every host at once (gcloud … ssh NAME --worker=all --command=…), and let them reach "
    "the first one's port 12355; alone, unset RANK, TPU_WORKER_HOSTNAMES and PRETRAIN_XLA_REHEARSAL",
    "devices": TPU_TAKEN,
    "kernels": "train with --attention reference until that is understood, and send us this line",
}
"""What to do if a stage ends with an error."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine says of itself, without opening its devices.

    kind: `TPU`, `CPU` or `CUDA`. name: of its chip or device, as the calibration's file is called. chip: in the table; None: no
    TPU, or an unknown one. own: the slice that this host is part of; None: no TPU, or it does not say. topology: the one whose
    estimate is wanted, its own unless another was named. device_count: devices of the run, once they are opened.
    """

    kind: str
    name: str
    chip: Chip | None
    own: Topology | None
    topology: Topology | None
    chips_on_bus: int
    device_count: int = 0

    def seen(self, answer: Answer) -> Machine:
        """With what its devices have answered."""
        devices = answer.figures.get("devices")
        if devices is None:
            return self
        kind = devices["kind"]
        name = self.name if kind == "TPU" else "cpu" if kind == "CPU" else devices["name"]
        chip = self.chip if kind == "TPU" else None
        return dataclasses.replace(self, kind=kind, name=name, chip=chip, device_count=devices["count"])

    def is_of(self, report: Report | None) -> bool:
        """Whether a report of preflight is one of this very machine."""
        if report is None or self.own is None or self.kind != "TPU":
            return False
        return report.libtpu_topology == self.own.libtpu_name and report.devices == self.device_count


def this_machine(config: RunConfig) -> Machine:
    """What can be known without opening a device.

    Raises:
        UserError: the named topology does not exist.
    """
    chips = pci_chips()
    named = config.parallel.topology
    wanted = resolve_topology(named) if named else None
    if config.parallel.runtime == "torch":
        return Machine("CPU", "cpu", None, None, wanted, 0)
    is_tpu = os.environ.get("PJRT_DEVICE", "TPU" if chips else "CPU") == "TPU"
    if not is_tpu:
        return Machine("CPU", "cpu", None, None, wanted, len(chips))
    found = find_chip()
    chip = CHIPS.get(found.chip or "")
    own = _own_topology()
    return Machine("TPU", found.chip or found.name, chip, own, wanted or own, len(chips))


def _own_topology() -> Topology | None:
    """The slice that this host is part of. None means that it does not say, or that the table does not have it."""
    named = accelerator_type()
    try:
        return resolve_topology(named) if named else None
    except UserError:  # a generation or size that is not in the tables
        return None


def device_checks(answer: Answer, machine: Machine) -> list[Check]:
    """A check for each stage of the process that examined the devices."""
    own = machine.own if machine.kind == "TPU" else None
    chip = machine.chip
    peak = chip.peak_flops if chip else gpu_peak(machine.name)
    bandwidth = chip.hbm_bandwidth if chip else None
    judges: dict[str, Callable[[Figures], Check]] = {
        "start": lambda _figures: Check("start", "ok", "loaded"),
        "hosts": lambda figures: check_hosts(figures["facts"], figures["machines"]),
        "devices": lambda figures: judge_devices(figures, chip, own, machine.chips_on_bus),
        "kernels": judge_kernels,
        "matmul": lambda figures: judge_matmul(figures, peak),
        "stream": lambda figures: judge_stream(figures, bandwidth),
    }
    for kind in COLLECTIVES:
        judges[kind] = lambda figures, kind=kind: judge_collective(kind, figures, own)  # type: ignore[misc]
    fixes = (
        FIXES
        if machine.kind == "TPU"
        else FIXES | {"devices": "fix what it says, or set PJRT_DEVICE to another device"}
    )
    broken = answer.broken
    checks = []
    for stage, judge in judges.items():
        if stage in answer.figures and stage == "start":
            continue  # what follows shows that it went well
        if stage in answer.figures:
            checks.append(judge(answer.figures[stage]))
        elif stage in answer.errors:
            checks.append(failed(stage, answer.errors[stage], fixes.get(stage, SEND)))
        elif broken is not None and broken[0] == stage:
            checks.append(failed(stage, broken[1], fixes.get(stage, SEND)))
        elif stage in COLLECTIVES and "devices" in answer.figures and not broken and not answer.errors:
            continue
        else:
            checks.append(skipped(stage, "not reached", "fix what failed before it"))
    if "devices" in answer.figures and not {*COLLECTIVES} & {check.name for check in checks}:
        checks.append(skipped("collectives", "measured with --runtime xla only", "leave out --runtime torch"))
    return checks
