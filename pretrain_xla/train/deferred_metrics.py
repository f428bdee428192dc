"""Metrics fetched from the device without waiting for it, several steps at a time, with throughput over these steps.

A fetch is requested and collected later. Rows are recorded before they are checked, so that the rows that led to a stop can be
inspected.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.model import flops_per_token
from pretrain_xla.run_folder.goodput import STEP_SECONDS
from pretrain_xla.run_folder.metrics import Row
from pretrain_xla.run_folder.report import perplexity
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.step import METRICS


class DeferredMetrics:
    """The metrics of a run's steps.

    Attributes:
        read_until: last step of the newest fetch.
        clock: time between fetches.
        input_seconds: returns the seconds that the loop has waited for input so far.

    Args:
        config: of the run.
        runtime: fetches values from the device.
        first: number of updates when the run starts.
        record: called with the rows of each fetch, in order.
        check: called with the same rows after that; may stop the run.
        tokens: step → tokens trained on after it.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        first: int,
        record: Callable[[list[Row]], None],
        check: Callable[[list[Row]], None],
        tokens: Callable[[int], int],
    ) -> None:
        self.read_until = first
        self.clock = Clock()
        self.input_seconds: Callable[[], float] = lambda: 0.0
        self._config, self._runtime, self._record, self._check, self._tokens = config, runtime, record, check, tokens
        self._pending: deque[_Fetch] = deque()

    def request(self, history_NM: Tensor, done: int) -> None:
        """Start fetching the metrics of the steps since the last request, up to `done`, the last step of the history."""
        count = done - self.read_until
        if count:
            self._pending.append(_Fetch(self._runtime.fetch(history_NM), self.read_until, count))
            self.read_until = done

    def collect(self, leave: int = 0) -> None:
        """Wait for all fetches but the newest `leave`, record and check them."""
        while len(self._pending) > leave:
            self._check(self._take())

    def record_all(self) -> None:
        """Record all requested rows without checking them."""
        while self._pending:
            self._take()

    def _take(self) -> list[Row]:
        fetch = self._pending.popleft()
        with self._runtime.planned():
            values_NM = fetch.future.result()[-fetch.count :].tolist()
        rows = [_row(fetch.before + 1 + index, values) for index, values in enumerate(values_NM)]
        self._add_rates(rows[-1], fetch.arrived)
        self._record(rows)
        return rows

    def _add_rates(self, row: Row, arrived: float) -> None:
        """Add to the last row of a fetch what is measured over all of its steps."""
        row["perplexity"] = perplexity(row["loss"])
        row["tokens"] = self._tokens(row["step"])
        seconds, steps = self.clock.since(row["step"], arrived)
        if steps:
            rate = steps * self._config.tokens_per_step / seconds
            row["tokens_per_second"] = round(rate, 1)
            row[STEP_SECONDS] = round(seconds, 3)
            if self._runtime.peak_flops is not None:
                flops = rate * flops_per_token(self._config.model)
                row["mfu"] = flops / (self._runtime.peak_flops * self._runtime.device_count)
        if used := self._runtime.memory_bytes():
            row["memory_gb"] = round(used / 1e9, 3)
        row["input_seconds"] = round(self.input_seconds(), 3)
        row["compile_seconds"] = round(self._runtime.graph_counts().compile_seconds, 3)


def _row(step: int, values: list[float]) -> Row:
    """A step's metrics; those of skipped updates only where there are any."""
    row: Row = {"step": step, **dict(zip(METRICS, values, strict=True))}
    counts = {name: int(row.pop(name)) for name in ("skipped", "skipped_in_a_row")}
    return row | {name: count for name, count in counts.items() if count}


def check_validation(row: Row, checkpoints_dir: str) -> None:
    """Stop if the validation loss is not finite: the weights are unusable.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not math.isfinite(row["valid_loss"]):
        raise UserError(
            f"step {row['step']}: the validation loss is {row['valid_loss']}: lower --learning-rate, raise --warmup-steps or "
            f"set --max-grad-norm 1.0; the run then continues from the newest checkpoint in {checkpoints_dir}, which is from "
            "before; if it comes back at once, remove that one, too"
        )


class _Fetch:
    """A fetch of the metrics of `count` steps after step `before`; `arrived` is the time when the device was done."""

    def __init__(self, future: Future[Tensor], before: int, count: int) -> None:
        self.future, self.before, self.count = future, before, count
        self.arrived = math.inf
        future.add_done_callback(self._stamp)

    def _stamp(self, _future: Future[Tensor]) -> None:
        self.arrived = time.perf_counter()


class Clock:
    """Time between fetches, excluding validation and checkpoints."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Start measuring after `step`."""
        self._time, self._step = time.perf_counter(), step

    def since(self, step: int, now: float) -> tuple[float, int]:
        """Seconds and steps since the last call, up to `now`; the next measurement starts there."""
        # A future wakes its waiter before it runs its callbacks, so the time stamp may still be missing.
        now = min(now, time.perf_counter())
        result = (max(now - self._time, 1e-9), step - self._step)
        self._time, self._step = now, step
        return result
