"""Output of a run: a progress bar on a terminal, plain lines in a log file. Only the main process prints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pretrain_xla.config import RunConfig
from pretrain_xla.model import parameter_count
from pretrain_xla.redact import redacted
from pretrain_xla.run_folder.metrics import Row
from pretrain_xla.run_folder.report import shown
from pretrain_xla.runtime import Runtime


class Console:
    """Output of the main process; on other processes every method does nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        # Lines stay whole in a log file: no wrapping at 80 columns, no colour codes.
        self._console = rich.console.Console(quiet=not enabled, soft_wrap=True, highlight=False)

    def print(self, text: str) -> None:
        """Print a line."""
        self._console.print(redacted(text), markup=False)

    def note(self, text: str) -> None:
        """Print a line that the user should know."""
        self._console.print(f"note: {redacted(text)}", markup=False, style="cyan")

    def warn(self, text: str) -> None:
        """Print a line that the user should act on."""
        self._console.print(f"warning: {redacted(text)}", markup=False, style="yellow")

    def header(self, config: RunConfig, runtime: Runtime, first: int) -> None:
        """Print model, devices, precision, steps and attention before the first step."""
        axes = " x ".join(f"{axis} {size}" for axis, size in runtime.mesh.items())
        precision = config.train.mixed_precision or "fp32"
        self.print(
            f"{parameter_count(config.model) / 1e6:.2f}M parameters on {runtime.device_count} x {runtime.device_name} "
            f"({runtime.name}, {axes}, {precision}); steps {first} to {config.train.train_steps}, "
            f"{config.tokens_per_step:,} tokens each; files in {config.run_dir}"
        )
        self.print(f"attention: {runtime.attention}")

    def validation(self, row: Row) -> None:
        """Print a validation result."""
        self._console.print(
            f"step {row['step']:>6}  validation loss {row['valid_loss']:.4f}  perplexity {shown(row['valid_perplexity'], 2)}",
            markup=False,
            style="bold",
        )

    def evaluation(self, row: Row) -> None:
        """Print the scores, one line for each task."""
        tasks: dict[str, list[str]] = {}
        for name, value in row.items():
            task, _, score = name.partition("/")
            if score:
                tasks.setdefault(task, []).append(
                    f"{score} {shown(value)}" if isinstance(value, float) else f"{score} {value:,}"
                )
        for task, scores in tasks.items():
            self._console.print(f"step {row['step']:>6}  {task}  {'  '.join(scores)}", markup=False, style="bold")

    def summary(self, summary: dict[str, Any], run_dir: str) -> None:
        """Print the table at the end of a run."""
        table = Table(title="summary", show_header=False)
        valid = (summary["first_valid_loss"], summary["last_valid_loss"], summary["best_valid_loss"])
        graphs = ", ".join(f"{name} {count}" for name, count in summary["graphs"].items()) or "none"
        table.add_row("tokens", f"{summary['tokens']:,} in {summary['steps']} steps, {summary['seconds']:.0f} s")
        if None not in valid:
            table.add_row("validation loss", f"first {valid[0]:.4f}, last {valid[1]:.4f}, best {valid[2]:.4f}")
        if summary["tokens_per_second"]:
            share = f", {summary['mfu']:.1%} of peak" if summary["mfu"] else ""
            table.add_row("rate", f"{summary['tokens_per_second']:,.0f} tokens/s{share}")
        parts = [(seconds, what) for what, seconds in summary["wall_seconds_in"].items() if what != "steps"]
        most = ", ".join(
            f"{what} {seconds:,.0f} s" for seconds, what in sorted(parts, reverse=True)[:3] if seconds >= 1
        )
        starts = f"{summary['starts']} start" + ("s" if summary["starts"] > 1 else "")
        table.add_row(
            "goodput",
            f"{summary['goodput']:.1%} of {summary['wall_seconds']:,.0f} s in {starts}" + (f"; {most}" if most else ""),
        )
        if summary["skipped_updates"]:
            table.add_row("skipped updates", f"{summary['skipped_updates']:,}")
        table.add_row("graphs compiled", f"{graphs}; {summary['compile_seconds']:.0f} s")
        table.add_row(
            "graph guard",
            f"{summary['recompilations']} recompilations, {summary['host_fallbacks']} host fallbacks, "
            f"{summary['unplanned_host_transfers']} unplanned host transfers",
        )
        table.add_row("files", run_dir)
        self._console.print(table)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress bar of `what`; yields a function that takes how much is done so far."""
        with self._bar("") as bar:
            task = bar.add_task(what, total=total, detail="")
            yield lambda done: bar.update(task, completed=done)

    @contextlib.contextmanager
    def training(self, first: int, last: int) -> Iterator[TrainingBar]:
        """Progress bar of the training loop."""
        with self._bar("{task.fields[detail]}") as bar:
            yield TrainingBar(bar, first, last, self)

    def _bar(self, detail: str) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn(detail),
            console=self._console,
            transient=True,
            disable=not self.is_terminal,
        )

    @property
    def is_terminal(self) -> bool:
        """Whether the output is a terminal."""
        return self._enabled and self._console.is_terminal


class TrainingBar:
    """Progress of training: a live bar on a terminal, a line a reading elsewhere. Never touches the device."""

    def __init__(self, bar: Progress, first: int, last: int, console: Console) -> None:
        self._bar, self._console, self._last = bar, console, last
        self._task = bar.add_task("training", total=last, completed=first, detail="")

    def advance(self, done: int) -> None:
        """Update number `done` has been handed to the device."""
        self._bar.update(self._task, completed=done)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar, for work between two steps; see `Console.progress`."""
        task = self._bar.add_task(what, total=total, detail="")
        yield lambda done: self._bar.update(task, completed=done)
        self._bar.remove_task(task)

    def show(self, row: Row) -> None:
        """The newest reading of the metrics."""
        rate = f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        share = f"  {row['mfu']:.1%} mfu" if "mfu" in row else ""
        detail = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  rate {row['learning_rate']:.2e}{rate}{share}"
        if self._console.is_terminal:
            self._bar.update(self._task, detail=detail)
        else:
            self._console.print(f"step {row['step']:>6}/{self._last}  {detail}")
