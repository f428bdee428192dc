"""Progress of tokenization, as a line on the terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 60.0  # between lines where there is no terminal


class ProgressLine:
    """Progress on standard error: a live line on a terminal, otherwise a new line every minute."""

    def __init__(self, show: bool) -> None:
        console = Console(stderr=True)
        self._lines = show and not console.is_terminal
        self._begin = self._last_line = time.monotonic()
        self._documents = self._tokens = 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        hide = not (show and console.is_terminal)
        self._progress = Progress(*columns, *times, console=console, transient=True, disable=hide)
        self._task = self._progress.add_task("tokenizing", total=None)

    def advance(self, documents: int, tokens: int, share: float | None) -> None:
        """Count more documents and tokens.

        Args:
            documents: since the last call.
            tokens: since the last call.
            share: of the source that has been read in total, 0 to 1; None means unknown.
        """
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        seconds = now - self._begin or 1e-9
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / seconds / 1e6:.1f}M tokens/s"
        self._progress.update(self._task, description=text, total=share and 1.0, completed=share)
        if self._lines and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(text if share is None else f"{text}, {share:.1%}", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
