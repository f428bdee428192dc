"""Goodput: the share of a run's wall time that went into steps that counted, over all of its starts.

The wall time is that since the first start of the run, also while it was down. The steps that counted are those in
`metrics.jsonl`, where a resumed run drops the lines of steps that it makes again; every reading of the metrics there has the
seconds of its steps. Where the rest went is kept in `starts.jsonl`: a line when the run starts, and one with each checkpoint,
with the seconds that this start has spent. A start that is killed leaves the line of its last checkpoint. What came after that
was lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from pretrain_xla.run_folder.appender import Appender
from pretrain_xla.run_folder.metrics import Row, metrics_path, read_metrics, rewrite

STARTS_FILE = "starts.jsonl"
STEP_SECONDS = "step_seconds"
"""In the last row of each reading of the metrics: seconds of the steps since the reading before."""


class Goodput:
    """The account of one start of a run.

    Args:
        run_dir: the run's folder. None means that nothing is written, and nothing counted of earlier starts.
        first: number of updates when this start begins; 0 begins a new account.
        began: time at which the process began with the run, in seconds since 1970. None means now.
        warn: called with a line if the account cannot be written.
        writes: whether this start is entered. False only sums up the earlier ones.
    """

    def __init__(
        self,
        run_dir: str | None,
        first: int = 0,
        began: float | None = None,
        warn: Callable[[str], None] = print,
        *,
        writes: bool = True,
    ) -> None:
        self._began = time.time() if began is None else began
        self._spent: dict[str, float] = defaultdict(float)
        self._counted = 0.0
        self._earlier: list[dict[str, Any]] = []
        self._file: Appender | None = None
        self._is_entered = writes
        if run_dir is None:
            return
        path = os.path.join(run_dir, STARTS_FILE)
        if first:
            self._earlier = read_starts(path)
            metrics = metrics_path(run_dir)
            rows = read_metrics(metrics) if os.path.exists(metrics) else []
            self._counted = sum(row.get(STEP_SECONDS, 0.0) for row in rows if row["step"] <= first)
        if not writes:
            return
        rewrite(path, [json.dumps(line) + "\n" for line in self._earlier])  # without what a kill cut off
        self._file = Appender(path, warn)
        self._write({"began": self._began, "step": first})

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """While it is open, time is spent on something else than steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - began

    def begins_steps(self) -> None:
        """Called before the first step: all time so far that went nowhere else was needed to start."""
        self._spent["starting"] += time.time() - self._began - sum(self._spent.values())

    def first_step(self, seconds: float) -> None:
        """The seconds of the first step of a start, which compiles."""
        self._spent["first step"] += seconds

    def count(self, rows: list[Row]) -> None:
        """Take in a reading of the metrics; adds `goodput` so far to its last row."""
        self._counted += sum(row.get(STEP_SECONDS, 0.0) for row in rows)
        if rows and STEP_SECONDS in rows[-1]:
            rows[-1]["goodput"] = round(self._counted / self._wall(), 4)

    def keep(self, done: int) -> None:
        """Write what this start has spent up to update `done`."""
        spent = {what: round(seconds, 3) for what, seconds in self._spent.items()}
        self._write({"until": time.time(), "step": done, "seconds": spent})

    def summary(self) -> dict[str, Any]:
        """For `summary.json`: the goodput, the number of starts, the wall time, and where it went, in seconds."""
        spent = defaultdict(float, self._spent)
        for line, after in zip(self._earlier, [*self._earlier[1:], {"began": 0.0}], strict=False):
            if "began" in after:  # the last line of a start
                for what, seconds in line.get("seconds", {}).items():
                    spent[what] += seconds
        wall = self._wall()
        known = {"steps": self._counted, **spent}
        parts = {what: round(value, 1) for what, value in known.items()}
        return {
            "goodput": round(self._counted / wall, 4),
            "starts": max(self._is_entered + sum("began" in line for line in self._earlier), 1),
            "wall_seconds": round(wall, 1),
            "wall_seconds_in": parts | {"lost": round(max(wall - sum(known.values()), 0.0), 1)},
        }

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wall(self) -> float:
        first = next((line["began"] for line in self._earlier if "began" in line), self._began)
        return max(time.time() - min(first, self._began), 1e-9)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write((json.dumps(line) + "\n").encode())


def read_starts(path: str) -> list[dict[str, Any]]:
    """The lines of a `starts.jsonl` that are intact; none if it cannot be read: it is an account, and nothing depends on it."""
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError:
        return []
    return [line for line in map(_line, lines) if line is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    seconds = line.get("seconds", {})
    if not isinstance(seconds, dict):
        return None
    numbers = [*seconds.values(), *(line[key] for key in ("began", "until") if key in line)]
    return line if all(isinstance(number, int | float) for number in numbers) else None
