"""Several tasks on one model: read once, scored any number of times, in the training loop or by `evaluate.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.scorer import Scorer
from pretrain_xla.evaluate.tasks import Reader, Settings, prepare_task
from pretrain_xla.model import GPT
from pretrain_xla.runtime import Runtime
from pretrain_xla.tokenizers.tokenizer import Tokenizer

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(label, total) → a context that yields a function of how much is done so far."""


@dataclass(frozen=True)
class Result:
    """Result of a task.

    scores: name → value. errors: name → standard error. source: where the items came from. items: how many. cut: rows longer
    than the model, which lost their beginning. examples: results of each item.
    """

    task: str
    definition: str
    source: str
    items: int
    cut: int
    scores: dict[str, float]
    errors: dict[str, float]
    seconds: float
    examples: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return asdict(self)


class Evaluation:
    """Tasks that are read and tokenized, for a model on its device.

    Args:
        model: prepared by `runtime.prepare_model`.
        runtime: where it runs.
        load_tokenizer: returns the model's tokenizer; called if a task has text.
        tasks: `NAME` or `NAME=SOURCE` each.
        settings: see `Settings`.
        batch_size: rows of full length in a batch, over all devices.
        top_k: each k of the top-k accuracies.
        begins: see `LoadedModel.adds_bos`.

    Raises:
        UserError: an unknown task, no items, malformed items, or a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        model: GPT,
        runtime: Runtime,
        load_tokenizer: Callable[[], Tokenizer],
        tasks: Sequence[str],
        settings: Settings,
        *,
        batch_size: int,
        top_k: Sequence[int] = (),
        begins: bool = False,
    ) -> None:
        self.scorer = Scorer(model, runtime, batch_size, top_k)
        reader = Reader(load_tokenizer, self.scorer.max_length, model.config.vocab_size, self.scorer.top_k, begins)
        self.tasks = [prepare_task(word, settings, reader) for word in tasks]
        names = [task.name for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"task {twice.pop()!r} is named twice")

    def __call__(self, progress: Progress) -> list[Result]:
        """Score every task; all processes get the same results."""
        results = []
        for task in self.tasks:
            began = time.perf_counter()
            with progress(task.name, len(task.rows)) as advance:
                measured = task.measure(self.scorer(task.rows, advance))
            seconds = round(time.perf_counter() - began, 2)
            results.append(
                Result(
                    task.name, task.definition, task.source, task.items, sum(row.lost > 0 for row in task.rows),
                    measured.scores, measured.errors, seconds, measured.examples,
                )
            )  # fmt: skip
        return results
