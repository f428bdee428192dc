"""The report as tables: in colour on a terminal, without colour in a file."""

from __future__ import annotations

import rich.box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pretrain_xla.preflight.estimate import Estimate
from pretrain_xla.preflight.memory import Memory
from pretrain_xla.preflight.report import Report

GIB = 2**30
MOST_OPERATIONS = 10


def render(report: Report) -> RenderableType:
    """The whole report."""
    parts: list[RenderableType] = [_header(report), _verdict(report), _memory(report.memory)]
    if report.memory.largest:
        parts.append(_largest(report.memory))
    if report.estimate is not None:
        parts += [_time(report, report.estimate), _operations(report.estimate)]
        if report.collectives:
            parts.append(_communication(report, report.estimate))
    parts.append(_run(report))
    parts += [_finding(finding.level, finding.text) for finding in report.findings]
    return Group(*parts)


def size(count: float) -> str:
    """Bytes as text, in the compiler's binary units."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def table(title: str, *columns: str) -> Table:
    """A table in the common style: the first column left-aligned, figures right-aligned."""
    made = Table(
        title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=bool(columns)
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    return made


def _header(report: Report) -> Text:
    mesh = " x ".join(f"{axis} {count}" for axis, count in report.mesh.items())
    changed = {key: value for key, value in report.settings.items() if value not in (None, False, "none", "sdpa")}
    settings = ", ".join(f"{key} {value}" for key, value in changed.items())
    return Text(
        f"{report.parameters / 1e6:.1f}M parameters on {report.topology} ({report.libtpu_topology}, {report.chips} chips, "
        f"{report.devices} devices; mesh {mesh})\n{settings}; {report.tokens_per_step:,} tokens a step; libtpu {report.libtpu}"
    )


def _verdict(report: Report) -> Text:
    memory = report.memory
    share = memory.total / memory.capacity
    if report.fits:
        return Text(
            f"\nFITS: {size(memory.total)} of {size(memory.capacity)} on each {report.device_noun} ({share:.0%})",
            "bold green",
        )
    needed = f"needs at least {size(memory.total)} of {size(memory.capacity)} on each {report.device_noun}"
    return Text(f"\nDOES NOT FIT: {needed}", "bold red")


def _memory(memory: Memory) -> Table:
    made = table("HBM on each device", "what", "size", "share")
    rows = [
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("gradients, activations, scratch", memory.temporaries),
        ("batch and constants", memory.batch + memory.other),
        ("padding of the above inputs", memory.padding),
        ("results that reuse no input", memory.outputs),
        ("program", memory.code),
    ]
    for what, count in rows:
        if count:
            made.add_row(what, size(count), f"{count / memory.capacity:.1%}")
    made.add_section()
    made.add_row("together", size(memory.total), f"{memory.total / memory.capacity:.1%}")
    made.add_row("for programs (the rest is reserved)", size(memory.capacity), f"of {size(memory.hbm)}")
    return made


def _largest(memory: Memory) -> Table:
    title = "alive at the fullest moment" if memory.fits else "largest allocations, by the compiler"
    made = table(title, "where", "size", "count", "each")
    for row in memory.largest[:MOST_OPERATIONS]:
        made.add_row(row.where, size(row.bytes), str(row.count), row.shape)
    return made


def _time(report: Report, estimate: Estimate) -> Table:
    columns, speeds = ["optimistic", "conservative"], [estimate.optimistic, estimate.conservative]
    if report.calibrated is not None:
        columns.append(f"conservative x {report.calibrated.ratio:.2f}, as measured")
        speeds.append(report.calibrated.speed)
    made = table("one step (estimates)", "", *columns)
    made.add_row("step time", *(duration(one.seconds) for one in speeds))
    made.add_row("tokens/s", *(f"{one.tokens_per_second:,.0f}" for one in speeds))
    made.add_row("tokens/s for each chip", *(f"{one.tokens_per_second_per_chip:,.0f}" for one in speeds))
    made.add_row("model flops utilisation", *(f"{one.mfu:.1%}" for one in speeds))
    made.add_section()
    made.add_row(f"arithmetic, {estimate.flops / 1e12:.2f} TFLOP at peak", duration(estimate.flops_seconds), "")
    made.add_row(
        f"HBM traffic, {estimate.hbm_bytes / 1e9:.1f} GB at full bandwidth", duration(estimate.bytes_seconds), ""
    )
    made.add_row(f"{estimate.cycles:,} cycles of the compiler's schedule", "", duration(estimate.cycle_seconds))
    if estimate.kernels:
        made.add_row(f"{estimate.kernels} kernels, by their own cost", "", duration(estimate.kernel_seconds))
    if report.collectives:
        all_of_it, exposed = duration(estimate.communication_seconds), duration(estimate.exposed_seconds)
        made.add_row("interconnect: all, and what nothing hides", all_of_it, exposed)
    return made


def _operations(estimate: Estimate) -> Table:
    made = table(
        f"the {MOST_OPERATIONS} most expensive lines (~: backward)", "where", "time", "share", "count", "HBM", "largest"
    )
    total = estimate.cycle_seconds + estimate.kernel_seconds
    for row in estimate.operations[:MOST_OPERATIONS]:
        moved = f"{row.bytes / 1e9:.2f} GB"
        made.add_row(row.where, duration(row.seconds), f"{row.seconds / total:.1%}", str(row.count), moved, row.what)
    return made


def _communication(report: Report, estimate: Estimate) -> Table:
    made = table("communication in a step", "kind", "devices", "count", "bytes", "type", "time", "exposed")
    for row in report.collectives:
        kind = row.kind
        types = ", ".join(row.dtypes)
        times = duration(row.seconds), duration(row.exposed)
        made.add_row(kind, str(row.group), str(row.count), size(row.bytes), types, *times)
    return made


def _run(report: Report) -> Text:
    lines = [""]
    if report.run is not None:
        run = report.run
        hours = f"{run.hours_optimistic:,.2f} to {run.hours_conservative:,.2f} hours"
        line = f"The run: {run.tokens / 1e9:.2f}B tokens in {run.steps:,} steps: {hours}"
        if run.dollars_conservative is not None:
            line += f", ${run.dollars_optimistic:,.2f} to ${run.dollars_conservative:,.2f}"
        lines.append(line + " (without validation and checkpoints)")
    if report.calibrated is not None:
        one = report.calibrated
        cost = f", ${one.dollars:,.2f}" if one.dollars is not None else ""
        lines.append(
            f"By measurement: {one.hours:,.2f} hours{cost}. A step took {one.ratio:.2f} times the conservative estimate on "
            f"{one.measured}, {one.basis}: {one.file}"
        )
    lines.append(
        f"Compiling took {report.trace_seconds:.0f} s of tracing and {report.compile_seconds:.0f} s in libtpu on "
        f"{report.host_cores} cores; a TPU's host, with more of them, should take no longer at the first start"
    )
    return Text("\n".join(lines))


def _finding(level: str, text: str) -> Text:
    return Text(f"{level}: {text}", style="yellow" if level == "warning" else "cyan")


def console(*, stderr: bool = False) -> Console:
    """The output; in a file it is so wide that no line is broken."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)
