"""Metrics on their way from the device to the record, several steps at a time, with what is measured over them.

A reading is asked for and collected later, so that the device never waits. What is read is recorded before it is judged: the
rows that led to a loss that is no number are there for whoever looks for the cause.
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
from pretrain_xla.run_folder.metrics import Row
from pretrain_xla.run_folder.report import perplexity
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.step import METRICS


class DeferredMetrics:
    """The metrics of a run's steps.

    read_until: step that the newest reading goes to.

    Args:
        config: of the run.
        runtime: brings values from the device.
        first: updates made when the run begins.
        record: takes the rows of each reading, in order.
        tokens: tokens seen after a step.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        first: int,
        record: Callable[[list[Row]], None],
        tokens: Callable[[int], int],
    ) -> None:
        self.read_until = first
        self.clock = Clock()
        self.input_seconds: Callable[[], float] = lambda: 0.0
        self._config, self._runtime, self._record, self._tokens = config, runtime, record, tokens
        self._pending: deque[_Reading] = deque()

    def request(self, history_NM: Tensor, done: int) -> None:
        """Ask for the metrics of the steps since the last reading, up to `done`; the history ends with that step."""
        count = done - self.read_until
        if count:
            self._pending.append(_Reading(self._runtime.fetch(history_NM), self.read_until, count))
            self.read_until = done

    def collect(self, leave: int = 0) -> None:
        """Record the readings that have arrived; wait for all but the newest `leave` of them.

        Raises:
            UserError: a loss or a gradient norm is no number; its rows are recorded.
        """
        while len(self._pending) > leave:
            check_rows(self._take(), self._config.checkpoints_dir)

    def record_all(self) -> None:
        """Record what is asked for, whatever it says."""
        while self._pending:
            self._take()

    def _take(self) -> list[Row]:
        reading = self._pending.popleft()
        with self._runtime.planned():
            values_NM = reading.future.result()[-reading.count :].tolist()
        rows = [
            {"step": reading.before + 1 + index, **dict(zip(METRICS, values, strict=True))}
            for index, values in enumerate(values_NM)
        ]
        self._add_rates(rows[-1], reading.arrived)
        self._record(rows)
        return rows

    def _add_rates(self, row: Row, arrived: float) -> None:
        """To the last row of a reading, what is measured over the whole of it."""
        row["perplexity"] = perplexity(row["loss"])
        row["tokens"] = self._tokens(row["step"])
        seconds, steps = self.clock.since(row["step"], arrived)
        if steps:
            rate = steps * self._config.tokens_per_step / seconds
            row["tokens_per_second"] = round(rate, 1)
            if self._runtime.peak_flops is not None:
                flops = rate * flops_per_token(self._config.model)
                row["mfu"] = flops / (self._runtime.peak_flops * self._runtime.device_count)
        row["memory_gb"] = round(self._runtime.memory_bytes() / 1e9, 3)
        row["input_seconds"] = round(self.input_seconds(), 3)
        row["compile_seconds"] = round(self._runtime.graph_counts().compile_seconds, 3)


def check_rows(rows: list[Row], checkpoints_dir: str) -> None:
    """Stop at the first row that is no number: the weights after it are ruined.

    Raises:
        UserError: a loss, training or validation, or a gradient norm is NaN or infinite.
    """
    words = {"loss": "loss", "grad_norm": "gradient norm", "valid_loss": "validation loss"}
    for row in rows:
        for name, word in words.items():
            if not math.isfinite(row.get(name, 0.0)):
                raise UserError(
                    f"step {row['step']}: the {word} is {row[name]}: lower --learning-rate, raise --warmup-steps or set "
                    f"--max-grad-norm 1.0; the run then continues from the newest checkpoint in {checkpoints_dir}, which is "
                    "from before; if it comes back at once, remove that one, too"
                )


class _Reading:
    """Metrics on their way to the host: `count` steps after step `before`. The device was done when they `arrived`."""

    def __init__(self, future: Future[Tensor], before: int, count: int) -> None:
        self.future, self.before, self.count = future, before, count
        self.arrived = math.inf
        future.add_done_callback(self._stamp)

    def _stamp(self, _future: Future[Tensor]) -> None:
        self.arrived = time.perf_counter()


class Clock:
    """Time between readings, without what was spent on validation and checkpoints."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin again after `step`."""
        self._time, self._step = time.perf_counter(), step

    def since(self, step: int, now: float) -> tuple[float, int]:
        """Seconds and steps from the last call to `now`, and begin again there."""
        # A future wakes its waiter before it calls back, so a stamp may not be there yet.
        now = min(now, time.perf_counter())
        result = (max(now - self._time, 1e-9), step - self._step)
        self._time, self._step = now, step
        return result
