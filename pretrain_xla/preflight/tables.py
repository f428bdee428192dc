"""Tables of several configurations: the trials of a search, and two reports side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pretrain_xla.preflight.render import duration, size, table
from pretrain_xla.preflight.report import Report
from pretrain_xla.preflight.trials import Trial


def trials_table(title: str, trials: Sequence[Trial], best: Trial | None) -> Table:
    """Every trial with its verdict; the best one marked."""
    made = table(title, "change", "fits", "HBM", "tokens/s (conservative)", "step", "MFU", "")
    for trial in trials:
        mark = "best" if trial is best else ""
        style = "bold green" if trial is best else None if trial.fits else "dim"
        if trial.report is None:
            made.add_row(trial.label, "error", "", "", "", "", Text(trial.error), style="yellow")
            continue
        memory = f"{trial.report.memory.total / trial.report.memory.capacity:.0%}"
        estimate = trial.report.estimate
        if estimate is None:
            made.add_row(trial.label, "no", memory, "", "", "", mark, style=style)
            continue
        conservative = estimate.conservative
        figures = (f"{conservative.tokens_per_second:,.0f}", duration(conservative.seconds), f"{conservative.mfu:.1%}")
        made.add_row(trial.label, "yes", memory, *figures, mark, style=style)
    return made


def comparison(names: Sequence[str], reports: Sequence[Report]) -> Table:
    """Two reports side by side, with the second as a multiple of the first."""
    made = table("side by side", "", *names, "ratio")
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "parameters", lambda value: f"{value / 1e6:.1f}M"),
        ("tokens a step", "tokens_per_step", lambda value: f"{value:,.0f}"),
        ("HBM on each device", "memory.total", size),
        ("  gradients, activations, scratch", "memory.temporaries", size),
        ("step, optimistic", "estimate.optimistic.seconds", duration),
        ("step, conservative", "estimate.conservative.seconds", duration),
        ("  cycles", "estimate.cycle_seconds", duration),
        ("  kernels", "estimate.kernel_seconds", duration),
        ("  exposed communication", "estimate.exposed_seconds", duration),
        ("arithmetic", "estimate.flops", lambda value: f"{value / 1e12:.2f} TFLOP"),
        ("HBM traffic", "estimate.hbm_bytes", lambda value: f"{value / 1e9:.1f} GB"),
        ("tokens/s, conservative", "estimate.conservative.tokens_per_second", lambda value: f"{value:,.0f}"),
        ("MFU, conservative", "estimate.conservative.mfu", lambda value: f"{value:.1%}"),
        ("hours, conservative", "run.hours_conservative", lambda value: f"{value:,.2f}"),
        ("dollars, conservative", "run.dollars_conservative", lambda value: f"${value:,.2f}"),
        ("compiling", "compile_seconds", duration),
    ]
    made.add_row("fits", *("yes" if report.fits else "NO" for report in reports), "")
    for what, path, shown in rows:
        values = [_at(report, path) for report in reports]
        if all(v is None for v in values):
            continue
        cells = ["" if v is None else shown(v) for v in values]
        first, second = values
        ratio = f"{second / first:.2f}" if first and second is not None else ""
        made.add_row(what, *cells, ratio)
    return made


def _at(report: Report, path: str) -> float | None:
    """A figure of a report by its dotted name. None means that a part of it is missing."""
    value: Any = report
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return None if value is None else float(value)
