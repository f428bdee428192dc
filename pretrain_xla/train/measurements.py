"""What is measured and generated between two steps: validation loss, task scores and samples.

A request to stop cuts such work short at its next batch: it may take longer than a machine that is taken away waits. What was
due at the step of a checkpoint, and has no record, is made up for by the next start, before its first step. So is what was lost
because the process was killed in the middle of it. The numbers are the same, since the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from pretrain_xla.config import RunConfig
from pretrain_xla.evaluate import Evaluation, ValidationLoss
from pretrain_xla.run_folder.console import Console
from pretrain_xla.run_folder.goodput import Goodput
from pretrain_xla.run_folder.metrics import EVALUATION, SAMPLE, VALIDATION, MetricLog, Row, recorded_at
from pretrain_xla.run_folder.report import perplexity
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.deferred_metrics import check_validation
from pretrain_xla.train.samples import Samples

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(label, total) → a context that yields a function of how much is done so far."""


class CutShort(Exception):
    """The run was asked to stop while something was measured or generated, on every process alike."""


class Measurements:
    """Does what is due after a step. Every process calls the same, in the same order.

    Args:
        config, runtime, console: of the run.
        validation: loss on the validation data.
        evaluation: scores on tasks. None means that there are none.
        samples: generates text. None means that none is wanted.
        averaged: (updates so far) → while it is open, the model has the weights to measure.

    Attributes:
        measured: the step of the last validation of this process, and its loss.
        pulse: called at each batch; may raise `CutShort`.
        progress: shows how much of an evaluation is done.
        log: where results are recorded. None means nowhere: this is not the main process.
        goodput: counts the time that is spent.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        console: Console,
        validation: ValidationLoss,
        evaluation: Evaluation | None,
        samples: Samples | None,
        averaged: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self._config, self._runtime, self._console = config, runtime, console
        self._validation, self._evaluation, self._samples = validation, evaluation, samples
        self._averaged = averaged
        self.measured: tuple[int, float | None] = (-1, None)
        self.pulse: Callable[[], None] = lambda: None
        self.progress: Progress = console.progress
        self.log: MetricLog | None = None
        self.goodput = Goodput(None)

    def due(self, done: int) -> list[str]:
        """What is due after update `done`, in the order in which it is done."""
        config = self._config
        intervals: dict[str, int | None] = {VALIDATION: config.train.valid_interval}
        if self._evaluation is not None:
            intervals[EVALUATION] = config.evaluation.eval_interval
        if self._samples is not None:
            intervals[SAMPLE] = config.logging.sample_interval
        return [kind for kind, interval in intervals.items() if is_due(interval, done, config.train.train_steps)]

    def owed(self, step: int) -> list[str]:
        """What was due at the step of this run's checkpoint, and has no record; the same on every process."""
        recorded: set[str] = recorded_at(self._config.run_dir, step) if self._runtime.is_main else set()
        owed: list[str] = self._runtime.hosts.first(
            [kind for kind in self.due(step) if kind not in recorded], "what is made up for"
        )
        return owed

    def make(self, kind: str, done: int) -> None:
        """Measure or generate what is due after update `done`, and record it.

        Raises:
            CutShort: the run was asked to stop; nothing is recorded.
            UserError: the validation loss is NaN or infinite.
        """
        self.pulse()  # before the first batch, which may compile for minutes
        with self.goodput.spending(kind), self._averaged(done):
            {VALIDATION: self._validate, EVALUATION: self._evaluate, SAMPLE: self._sample}[kind](done)

    def _validate(self, done: int) -> None:
        with self._runtime.planned():
            loss = self._validation(lambda _batch: self.pulse())
        self.measured = (done, loss)
        row = {"step": done, "valid_loss": loss, "valid_perplexity": perplexity(loss)}
        if self.log is not None:
            self.log.write([row], kind=VALIDATION)
        self._console.validation(row)
        check_validation(row, self._config.checkpoints_dir)

    def _evaluate(self, done: int) -> None:
        """Score the tasks of the config; the metrics name a score `task/score`."""
        assert self._evaluation is not None
        results = self._evaluation(self._pulsing)
        scores = {f"{result.task}/{name}": value for result in results for name, value in result.scores.items()}
        row: Row = {"step": done, **scores}
        if self.log is not None:
            self.log.write([row], kind=EVALUATION)
        self._console.evaluation(row)

    def _sample(self, done: int) -> None:
        assert self._samples is not None
        with self._runtime.planned():
            text = self._samples(lambda _tokens: self.pulse())
        if self.log is not None:
            self.log.write_sample(done, text)

    @contextmanager
    def _pulsing(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        with self.progress(what, total) as advance:

            def pulse_and_advance(done: int) -> None:
                self.pulse()
                advance(done)

            yield pulse_and_advance


def is_due(interval: int | None, done: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and after the last one, is due."""
    return done == last or (interval is not None and done % interval == 0)
