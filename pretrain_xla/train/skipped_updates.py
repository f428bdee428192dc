"""What the host says about skipped updates: a line for each reading of the metrics, and the end after too many in a row.

The device has decided (`update_guard.py`); here its metrics are read, some steps later. When a run stops here, its state is
that after its last good update, its checkpoints are from before, and the report says which tensors went bad and when. There is
no jump back to an older checkpoint: skipping has kept the bad data out of the state. The same command replays from the newest
checkpoint and comes by the same numbers to the same place; with a higher `max_skipped_updates` it goes past it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.metrics import Row
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.update_guard import UpdateGuard

NAMED = 3
"""Tensors that a report names."""


class SkippedUpdates:
    """Reads the rows of each fetch.

    Attributes:
        in_a_row: of the newest row read. Above 0, nothing shows that the present weights are good.
    """

    def __init__(self, guard: UpdateGuard, runtime: Runtime, config: RunConfig, warn: Callable[[str], None]) -> None:
        self._guard, self._runtime, self._warn = guard, runtime, warn
        self._limit, self._checkpoints_dir = config.train.max_skipped_updates, config.checkpoints_dir
        self.in_a_row = 0

    def check(self, rows: list[Row], done: int) -> None:
        """Report the skipped updates among `rows`; `done` is the last step that the device has been given.

        Raises:
            UserError: too many in a row.
        """
        self.in_a_row = rows[-1].get("skipped_in_a_row", 0)
        skipped = [row for row in rows if "skipped" in row]
        if skipped:
            self._warn(describe(skipped, [row["step"] for row in rows]))
        for row in rows:
            if row.get("skipped_in_a_row", 0) >= self._limit:
                raise UserError(self._report(row, done))

    def _report(self, row: Row, done: int) -> str:
        count, last = row["skipped_in_a_row"], row["step"]
        return (
            f"step {last}: {count} updates in a row were skipped, from step {last - count + 1} on: {_reason(row)}; "
            f"{self._bad_gradients(done)}; the weights are those after step {last - count}: lower --learning-rate, raise "
            f"--warmup-steps or set --max-grad-norm 1.0, and the run continues from the newest checkpoint in "
            f"{self._checkpoints_dir} (if it comes back at once, remove that one, too); if data are the cause, "
            f"--max-skipped-updates {10 * self._limit} goes past them"
        )

    def _bad_gradients(self, done: int) -> str:
        """Which gradients are bad, and from which step on."""
        with self._runtime.planned():
            counts = self._runtime.fetch(self._guard.diagnosis["bad_gradients"]).result().tolist()
        bad = [(done - count + 1, name) for name, count in zip(self._guard.names, counts, strict=True) if count]
        bad.sort(key=lambda one: one[0])
        if not bad:
            return f"at step {done} no gradient holds NaN or infinity"
        named = ", ".join(f"{name} from step {step} on" for step, name in bad[:NAMED])
        more = f", and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        return f"NaN or infinity in the gradients of {len(bad)} of {len(counts)} tensors: {named}{more}"


def describe(skipped: list[Row], steps: list[int]) -> str:
    """A line on the skipped updates among the given steps."""
    first = skipped[0]
    if len(skipped) == 1:
        return f"step {first['step']}: the update is skipped: {_reason(first)}"
    return (
        f"steps {steps[0]} to {steps[-1]}: {len(skipped)} updates are skipped; of the first, of step {first['step']}, "
        f"{_reason(first)}"
    )


def _reason(row: Row) -> str:
    for name, word in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if not math.isfinite(row[name]):
            return f"the {word} is {row[name]}"
    return (
        f"its loss {row['loss']:.4f} or gradient norm {row['grad_norm']:.2f} lies far above those of the steps before"
    )
