"""Metrics of a run: `metrics.jsonl`, passed on to TensorBoard and Weights & Biases.

`metrics.jsonl` has one line for each step, each validation and each evaluation. When a run resumes at step s, lines of later
steps (written after the last checkpoint) and a truncated last line are dropped; `samples.txt` is treated likewise. Neither a
full disk (`appender.py`) nor a damaged file ends the run: damaged lines are left out, with a warning, and a copy of the file is
kept.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.appender import Appender
from pretrain_xla.run_folder.trackers import Row, TensorBoard, WandB
from pretrain_xla.system_faults import disk_fault

__all__ = ["MetricLog", "Row", "metrics_path", "read_metrics", "read_rows", "rewrite", "to_json"]

DAMAGED = ".damaged"
"""Suffix of a copy of a file that was damaged."""
LARGEST = 2**63
"""A whole number beyond this is none that a run writes, and nothing that draws it can take it."""
SAMPLES_FILE = "samples.txt"
_HEADING = "--- step "
VALIDATION, EVALUATION, SAMPLE = "validation", "evaluation", "sample"
"""Kinds of rows, besides `train`, and samples."""


def to_json(value: Any, indent: int | None = None) -> str:
    """Standard JSON, with null for NaN and infinity."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str) -> list[Row]:
    """Rows of a `metrics.jsonl`, with NaN for null; see `read_rows`."""
    return read_rows(path)[0]


def read_rows(path: str) -> tuple[list[Row], list[int]]:
    """Rows of a `metrics.jsonl`, with NaN for null, and the numbers of its damaged lines, from 1.

    A last line that was cut off (by a kill) is neither.

    Raises:
        UserError: the file cannot be read.
    """
    rows, damaged = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if (row := _row(line)) is not None:
                    rows.append(row)
                elif line.endswith(b"\n"):
                    damaged.append(number)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return rows, damaged


def _row(line: bytes) -> Row | None:
    """The row of a line: a step, and numbers by name. None if it is anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or JSON of a great depth
        return None
    if not isinstance(row, dict) or not isinstance(step := row.get("step"), int) or step < 0:
        return None
    found = {name: math.nan if value is None else value for name, value in row.items()}
    return found if all(map(_is_number, found.values())) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)


def metrics_path(run_dir: str) -> str:
    """Path of a run's `metrics.jsonl`."""
    return os.path.join(run_dir, "metrics.jsonl")


class MetricLog:
    """Appends rows to `metrics.jsonl` and passes them to TensorBoard and Weights & Biases. Only the main process has one.

    Args:
        config: of the run.
        resumed_step: number of updates when the run starts; rows of later steps are dropped.
        warn: called with a line if something cannot be written; the run continues.
        wandb: also gets the rows, and is closed by `close`.

    Raises:
        UserError: the file cannot be written at the start.
    """

    def __init__(
        self, config: RunConfig, resumed_step: int, warn: Callable[[str], None] = print, wandb: WandB | None = None
    ) -> None:
        self.path, samples = metrics_path(config.run_dir), os.path.join(config.run_dir, SAMPLES_FILE)
        kept: list[Row] = []
        if resumed_step and os.path.exists(self.path):
            rows, damaged = read_rows(self.path)
            kept = [row for row in rows if row["step"] <= resumed_step]
            if (loss := what_is_lost(kept, damaged, resumed_step)) is not None:
                warn(f"{self.path}: {loss}; the file as it was is {_keep_copy(self.path)}")
        rewrite(self.path, [to_json(row) + "\n" for row in kept])
        if os.path.exists(samples):
            rewrite(samples, samples_until(samples, resumed_step))
        self._file = Appender(self.path, warn)
        self._samples = functools.cache(lambda: Appender(samples, warn))
        self._tensorboard = TensorBoard(config, resumed_step, warn) if config.logging.tensorboard else None
        self._trackers: list[TensorBoard | WandB] = [one for one in (self._tensorboard, wandb) if one is not None]

    def write(self, rows: list[Row], *, kind: str) -> None:
        """Record rows of one kind (`train`, `validation` or `evaluation`); each has a `step`."""
        self._file.write("".join(to_json(row) + "\n" for row in rows).encode())
        for tracker in self._trackers:
            tracker.rows(rows, kind)
        if kind != "train":
            self.flush()

    def flush(self) -> None:
        """Let nothing wait in memory: a checkpoint that becomes complete counts all that came before as recorded."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def write_sample(self, step: int, text: str) -> None:
        """Write text generated after `step` to `samples.txt` and TensorBoard."""
        self._samples().write(sample_entry(step, text).encode())
        if self._tensorboard is not None:
            self._tensorboard.text(step, text)
            self.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._samples.cache_info().currsize:
            self._samples().close()
        for tracker in self._trackers:
            tracker.close()


def recorded_at(run_dir: str, step: int) -> set[str]:
    """Which of validation, evaluation and sample a run's folder has records of, after a step."""
    path, samples = metrics_path(run_dir), os.path.join(run_dir, SAMPLES_FILE)
    rows = [row for row in read_metrics(path) if row["step"] == step] if os.path.exists(path) else []
    found = {VALIDATION} if any("valid_loss" in row for row in rows) else set()
    found |= {EVALUATION} if any("/" in name for row in rows for name in row) else set()
    if os.path.exists(samples):
        heading = f"{_HEADING}{step}\n"
        with open(samples, encoding="utf-8", errors="replace", newline="\n") as file:
            found |= {SAMPLE} if any(line == heading for line in file) else set()
    return found


def what_is_lost(kept: list[Row], damaged: list[int], resumed_step: int) -> str | None:
    """What a file of metrics lacks up to a step: damaged lines, and steps without a row. None means nothing.

    A run may begin at any step (`--from-checkpoint`), so steps before the first row are not missed.
    """
    there = {row["step"] for row in kept if "loss" in row}
    missing = resumed_step - min(there, default=1) + 1 - len(there)
    parts = [f"{len(damaged):,} damaged lines are left out, the first is line {damaged[0]}"] if damaged else []
    if missing > 0:
        parts.append(f"{missing:,} of the steps up to {resumed_step:,} have no row")
    return " and ".join(parts) or None


def _keep_copy(path: str) -> str:
    """Copy a file aside, under a name that is free; returns that.

    Raises:
        UserError: it cannot be written.
    """
    names = itertools.chain([path + DAMAGED], (f"{path}{DAMAGED}_{number}" for number in itertools.count(2)))
    copy = next(name for name in names if not os.path.exists(name))
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise UserError(f"{copy} cannot be written: {disk_fault(error) or error.strerror or error}") from None
    return copy


def rewrite(path: str, lines: Iterable[str]) -> None:
    """Replace a file's lines atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())  # otherwise a host that crashes may keep neither the old file nor the new
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise UserError(f"{path} cannot be written: {disk_fault(error) or error.strerror or error}") from None


def sample_entry(step: int, text: str) -> str:
    """A sample as it is written to `samples.txt`; a line that looks like a heading is indented."""
    return f"{_HEADING}{step}\n" + f"{text}\n".replace(f"\n{_HEADING}", f"\n {_HEADING}")


def samples_until(path: str, step: int) -> list[str]:
    """Lines of a `samples.txt` up to the last sample at or before `step`; a resumed run generates later ones again."""
    kept = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if (
                line.startswith(_HEADING)
                and (number := line[len(_HEADING) :].strip()).isdecimal()
                and (len(number) > 18 or int(number) > step)  # Python refuses to read numbers of thousands of digits
            ):
                break
            kept.append(line)
    return kept
