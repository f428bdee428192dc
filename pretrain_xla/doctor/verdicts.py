"""From figures to verdicts. Every function is pure: what a TPU would have to show is tested with its figures.

The floors are wide: the table has stated peaks and the compiler's own rates, and no rate here has been measured on a TPU yet.
They find what is broken, shared or not what it is taken for, and not a few per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain_xla.doctor.check import Check, Figures, Status, failed
from pretrain_xla.preflight.collectives import transfer_seconds
from pretrain_xla.preflight.render import duration, size
from pretrain_xla.preflight.report import Report
from pretrain_xla.preflight.topology import Topology
from pretrain_xla.runtime.chips import Chip

LEAST_SHARE = 0.5
"""Of the table's peak or bandwidth. By the compiler's schedule, a large matrix product gets 0.7 to 0.98 of the peak, and a pass
0.7 to 0.94 of the bandwidth."""
MOST_SHARE = 1.1
"""More than this is not the chip that the table means."""
LEAST_LINKS = 0.25
"""Of the table's rate: it leaves out latency, and takes the links to be free."""
SLOWEST_STEP = 3.0
"""Times the conservative estimate."""
MATMUL_ERROR = 0.5
"""In a result of whole numbers from -3 to 3, after 16 products in bf16."""
MEMORY_TAKEN = 0.1
"""Share of HBM in use before anything was put there."""
TPU_TAKEN = "end the program that uses the TPU (sudo lsof /dev/accel* /dev/vfio/*), or restart the VM"
SEND = "if it stays so, restart the VM or ask for another; a device that computes wrongly must not train"


def judge_devices(figures: Figures, chip: Chip | None, topology: Topology | None, chips_on_bus: int) -> Check:
    """What is there against what the slice's name promises.

    Args:
        figures: of `XlaBench.devices`, with `name`.
        chip: this TPU in the table. None means no TPU, or an unknown one.
        topology: the slice that this host says it is part of. None means that it does not say.
        chips_on_bus: TPU chips of this host.
    """
    kind, count, total = figures["kind"], figures["count"], figures["hbm_total"]
    noun = (
        "virtual CPU devices" if kind == "CPU" and count > 1 else f"{kind} devices" if count > 1 else f"{kind} device"
    )
    memory = f", {size(min(total))} of HBM each" if total else ""
    found = f"{figures['name']}: {count} {noun}, {figures['local']} on this host{memory}"
    expected = f"{topology.devices} of {topology.name}" if topology is not None and kind == "TPU" else ""
    if kind == "CPU" and chips_on_bus:
        fix = "unset PJRT_DEVICE, or set PJRT_DEVICE=TPU"
        return failed("devices", f"{found}, and {chips_on_bus} TPU chips that are not used", fix, expected, **figures)
    if topology is not None and kind == "TPU" and count != topology.devices:
        fix = "start doctor on every host of the slice at once, and unset TPU_VISIBLE_CHIPS and TPU_PROCESS_BOUNDS"
        return failed("devices", found, fix, expected, **figures)
    if chip is not None and total and min(total) < 0.9 * chip.usable_hbm:
        short = f"a device has {size(min(total))}, and a {chip.name} {size(chip.usable_hbm)}"
        return failed("devices", f"{found}: {short}", SEND, expected, **figures)
    taken = max((used / all_ for used, all_ in zip(figures["hbm_used"], total, strict=True) if all_), default=0.0)
    if taken > MEMORY_TAKEN:
        return failed("devices", f"{found}; {taken:.0%} of it is in use already", TPU_TAKEN, expected, **figures)
    unknown = "" if total or kind == "CPU" else "; libtpu does not tell the size of HBM"
    return Check("devices", "ok", found + unknown, expected, figures=figures)


def judge_kernels(figures: Figures) -> Check:
    """Attention against the reference."""
    tolerance, errors = figures["tolerance"], figures["errors"]
    worst = {name: max(values, key=_size_of) for name, values in errors.items()}
    name = max(worst, key=lambda name: _size_of(worst[name]))
    found = f"{figures['what']}: differs from the reference by {worst[name]:.1e} of its largest value ({name})"
    expected = f"at most {tolerance:g}"
    wrong = [index for index, value in enumerate(errors[name]) if not _size_of(value) <= tolerance]
    if wrong:
        fix = f"train with --attention reference until that is understood; {SEND}"
        return failed("kernels", f"{found} on device {_listed(wrong)}", fix, expected, **figures)
    return Check("kernels", "ok", found, expected, figures=figures)


def judge_matmul(figures: Figures, peak: float | None) -> Check:
    """Matrix products against the device's stated peak in operations/s. None means that it is unknown."""
    rate = figures["rate"]
    shown = f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
    found = f"{shown} a device ({figures['side']:,}³, {figures['dtype']})"
    return _judge_rate("matmul", found, figures, peak, MATMUL_ERROR, "TFLOP/s", 1e12)


def judge_stream(figures: Figures, bandwidth: float | None) -> Check:
    """Passes over memory against the device's stated bandwidth in bytes/s. None means that it is unknown."""
    found = (
        f"{figures['rate'] / 1e9:,.1f} GB/s a device (a pass over {size(figures['bytes'] / (2 * figures['passes']))})"
    )
    return _judge_rate("stream", found, figures, bandwidth, 0.0, "GB/s", 1e9)


def _judge_rate(
    name: str, found: str, figures: Figures, peak: float | None, tolerance: float, unit: str, scale: float
) -> Check:
    wrong = [index for index, error in enumerate(figures["errors"]) if not _size_of(error) <= tolerance]
    if wrong:
        return failed(name, f"{found}: wrong results on device {_listed(wrong)}", SEND, "right results", **figures)
    if peak is None:
        return Check(name, "ok", f"{found}, right results", figures=figures)
    share = figures["rate"] / peak
    found, expected = f"{found}, {share:.0%}", f"{peak / scale:,.0f} {unit}"
    if share < LEAST_SHARE:
        return failed(name, found, f"{TPU_TAKEN}; {SEND}", expected, **figures)
    if share > MOST_SHARE:
        fix = "check TPU_ACCELERATOR_TYPE: it names another chip than this, or the table of chips is wrong (tell us)"
        return failed(name, found, fix, expected, **figures)
    return Check(name, "ok", found, expected, figures=figures)


def judge_collective(kind: str, figures: Figures, topology: Topology | None) -> Check:
    """One collective among all devices, against the links of the slice."""
    devices, seconds, moved = figures["devices"], figures["seconds"], figures["bytes"]
    found = f"{size(moved)} among {devices} in {duration(seconds)}"
    if _size_of(figures["errors"][0]) > 0:
        return failed(kind, f"{found}: wrong results", SEND, "right results", **figures)
    sent = "all-reduce" if kind == "reduce-scatter" else kind  # see `XlaBench.collective`
    table = transfer_seconds(sent, devices, moved, topology) if topology is not None else 0.0
    if not table:
        return Check(kind, "ok", f"{found}, right results", figures=figures | {"table_seconds": None})
    figures = figures | {"table_seconds": table}
    found, expected = f"{found}, {table / seconds:.0%}", f"{duration(table)} by the links"
    if table / seconds < LEAST_LINKS:
        fix = "see that nothing else runs on the slice; a slice whose links are slow is given back and asked for again"
        return failed(kind, found, fix, expected, **figures)
    return Check(kind, "ok", found, expected, figures=figures)


def judge_steps(figures: Figures, estimate: Report | None, same_chip: bool) -> Check:
    """The trainer's steps beside preflight's estimate.

    Args:
        figures: of `measure_steps`.
        estimate: preflight's report. None means that there is none.
        same_chip: whether it is one of this very chip, so that the ratio means something.
    """
    mfu = f", MFU {figures['mfu']:.1%}" if figures["mfu"] is not None else ""
    memory = f", {size(figures['memory_bytes'])} in use" if figures["memory_bytes"] else ""
    compiled = f"; compiled in {duration(figures['compile_seconds'])}" if figures["compile_seconds"] else ""
    rate = f"{figures['tokens_per_second']:,.0f} tokens/s"
    found = f"{duration(figures['step_seconds'])} a step, {rate}{mfu}{memory}{compiled}"
    expected, status = _beside(figures, estimate)
    figures = figures | {"estimate": status, "same_chip": same_chip}
    name = f"{figures['steps']} steps"
    if figures["graph_events"]:
        fix = "run with --strict-graph, which stops at the line, and fix that line"
        return failed(name, f"{found}; {figures['graph_events'][0]}", fix, expected, **figures)
    if not figures["losses"] or any(loss is None for loss in figures["losses"]):
        fix = (
            "check the kernels and products above; lower --learning-rate or set --max-grad-norm 1.0 if those are right"
        )
        return failed(name, f"{found}; the loss is not finite", fix, expected, **figures)
    ratio = status["ratio"]
    if same_chip and ratio is not None and ratio > SLOWEST_STEP:
        fix = "see whether another program runs, and whether the rates above are low; else send us the calibration file"
        return failed(name, found, fix, expected, **figures)
    return Check(name, "ok", found, expected, figures=figures)


def _beside(figures: Figures, estimate: Report | None) -> tuple[str, Figures]:
    """Preflight's estimate for display, and its figures with the ratio."""
    none: Figures = {"topology": None, "ratio": None, "seconds": None}
    if estimate is None:
        return "", none
    none["topology"] = estimate.topology
    if estimate.estimate is None:
        return f"{estimate.topology}: does not fit, by preflight", none
    best, conservative = estimate.estimate.optimistic.seconds, estimate.estimate.conservative.seconds
    ratio = figures["step_seconds"] / conservative
    shown = f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"
    text = (
        f"{estimate.topology} by preflight: {duration(best)} to {duration(conservative)}, "
        f"{size(estimate.memory.total)} of HBM; measured / conservative = {shown}"
    )
    more: Figures = {
        "seconds": conservative,
        "optimistic_seconds": best,
        "hbm_bytes": estimate.memory.total,
        "libtpu": estimate.libtpu,
        "ratio": ratio,
    }
    return text, none | more


def status_of(checks: Sequence[Check]) -> Status:
    """`failed` if one failed."""
    return "failed" if any(check.status == "failed" for check in checks) else "ok"


def _size_of(value: float) -> float:
    """The size of an error; NaN is larger than all."""
    return math.inf if math.isnan(value) else abs(value)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
