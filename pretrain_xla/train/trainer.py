"""The loop: a batch and an update at each step; at intervals a validation, a fetch of the metrics and a checkpoint.

The device never waits for the loop. One thread copies batches ahead of the step. Another fetches metrics, `log_interval` steps
at a time, at least one fetch behind. Checkpoints are copied to the host, and written by a third.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.data.batches import Batches, sequences_of
from pretrain_xla.data.dataset import TokenDataset, open_dataset
from pretrain_xla.data.find_shards import Split
from pretrain_xla.data.prefetch import Prefetcher, pipeline
from pretrain_xla.errors import UserError
from pretrain_xla.interop.upload import pushing
from pretrain_xla.model import parameter_count
from pretrain_xla.redact import redacted_tree
from pretrain_xla.run_folder.build import (
    build_examples,
    build_model,
    build_optimizer,
    execution_of,
    placing_zeros,
)
from pretrain_xla.run_folder.checkpoint import LAST_PATIENCE, CheckpointInfo
from pretrain_xla.run_folder.checkpoint_marker import DataPosition
from pretrain_xla.run_folder.console import Console
from pretrain_xla.run_folder.data_position import describe_changes, resume_position
from pretrain_xla.run_folder.goodput import Goodput
from pretrain_xla.run_folder.metrics import SAMPLE, VALIDATION, MetricLog, Row
from pretrain_xla.run_folder.records_copy import records_copy
from pretrain_xla.run_folder.report import perplexity, shown, summarised_steps, write_report
from pretrain_xla.run_folder.same_everywhere import check_same_data
from pretrain_xla.run_folder.tokenizer_check import tokenizer_of_run
from pretrain_xla.run_folder.trackers import WandB
from pretrain_xla.runtime import Runtime
from pretrain_xla.runtime.shards import unstack_shards
from pretrain_xla.train.averaged_weights import AveragedWeights
from pretrain_xla.train.deferred_metrics import DeferredMetrics
from pretrain_xla.train.evaluations import build_evaluation, build_validation
from pretrain_xla.train.graph_guard import GraphGuard
from pretrain_xla.train.maintenance import watching_notices
from pretrain_xla.train.measurements import CutShort, Measurements, is_due
from pretrain_xla.train.resume import find_start, load_start
from pretrain_xla.train.samples import Samples
from pretrain_xla.train.skipped_updates import SkippedUpdates
from pretrain_xla.train.start import Start
from pretrain_xla.train.step import METRICS, TrainStep, step_seed
from pretrain_xla.train.stop_after import stopping_after
from pretrain_xla.train.stop_signal import StopSignal
from pretrain_xla.train.watchdog import Watchdog


class Trainer:
    """One run in one process. The constructor checks everything that can be checked early; then call `fit` or `evaluate`."""

    def __init__(self, config: RunConfig, runtime: Runtime, began: float | None = None) -> None:
        """began: time at which the process began with the run, in seconds since 1970. None means now."""
        self.config, self.runtime = config, runtime
        self._began = time.time() if began is None else began
        train = config.train
        self.console = Console(enabled=runtime.is_main)
        self._rows = runtime.rows(train.train_batch_size)
        valid_data = _open(config, config.data.valid_dir, "valid")
        # Evaluation needs no training data, and often runs where there is none.
        train_data = valid_data if train.mode == "evaluate" else _open(config, config.data.train_dir, "train")
        self.data_fingerprint = train_data.fingerprint
        check_same_data(config, self.data_fingerprint, valid_data.fingerprint, runtime.hosts)
        made_with = tokenizer_of_run(config)
        data, note = self.data_fingerprint, self.console.note
        start = find_start(config, data, note, runtime.hosts)
        model = build_model(config, runtime.compute_dtype, train.seed if not start.tensors else None)
        self.model = runtime.prepare_model(model, execution_of(config))
        self.optimizer = build_optimizer(config, self.model, placing_zeros(runtime), runtime.map_matrices)
        examples = build_examples(config, train_data)
        self.step = TrainStep(self.model, self.optimizer, runtime, config, examples)
        state = self.step.named_state()
        self.start: Start = load_start(start, state, config, data, note, runtime.load_shards, runtime.hosts)
        self.tokenizer_fingerprint = made_with.found()
        if self.tokenizer_fingerprint is None and self.start.info is not None:
            self.tokenizer_fingerprint = self.start.info.tokenizer
        self.batches = self._batches(train_data)
        self._records = records_copy(config, self.console.warn) if runtime.is_main else None
        if self._records is not None:
            if self.start.own and train.mode != "evaluate":
                self._records.fetch(self.start.step)
            self.start.store.completing = self._records.send
        self.skipped = SkippedUpdates(self.step.guard, runtime, config, self.console.warn)
        self._train_step = runtime.compile(self.step, "train", state=self.step.state)
        self.validation = build_validation(config, self.step, runtime, valid_data, self._share(train.eval_batch_size))
        trains = train.mode != "evaluate"
        self.measurements = Measurements(
            config,
            runtime,
            self.console,
            self.validation,
            build_evaluation(config, self.model, runtime) if trains else None,
            Samples(config, self.model, runtime) if trains and config.logging.sample_interval is not None else None,
            AveragedWeights(self.optimizer, runtime),
        )
        resumes = trains and self.start.own and self.start.step <= train.train_steps
        self._owed = self.measurements.owed(self.start.step) if resumes else []
        self.guard = GraphGuard(runtime, strict=train.strict_graph, say=self.console.warn)
        logs = config.wandb.wandb_logging and runtime.is_main and trains and not self._is_done
        self.wandb = WandB(config, self.start.step if self.start.own else 0, self.console.warn) if logs else None
        self.start.release()

    def _batches(self, dataset: TokenDataset) -> Batches:
        """The batches of this run's steps, from its present position in the data."""
        config, train, info = self.config, self.config.train, self.start.info
        length = config.model.seq_length
        sequences = int(sequences_of(dataset, length).sum())
        self.data_position = resume_position(info, config, self.data_fingerprint, sequences)
        if (
            info is not None
            and train.mode != "evaluate"
            and (line := describe_changes(info, config, self.data_position))
        ):
            self.console.note(line)
        return Batches(
            dataset,
            sequences_per_batch=config.sequences_per_step,
            seq_length=length,
            seed=self.data_position.seed,
            shuffle=True,
            shuffle_window=self.data_position.shuffle_window,
            drop_last=config.data.drop_last and train.mode != "evaluate",
            start=self.data_position.position,
            steps=max(train.train_steps - self.start.step, 0),
            share=self._share(train.train_batch_size),
        )

    def evaluate(self) -> float:
        """Print loss and perplexity on `valid_dir`; returns the loss."""
        with self.console.progress("evaluating", self.validation.steps) as advance:
            loss = self.validation(advance)
        self.console.print("** Testing results **")
        self.console.print(f"Loss: {loss:.6f}")
        self.console.print(f"Perplexity: {shown(perplexity(loss))}")
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: the weights are damaged, or the compute precision is too low")
        return loss

    @property
    def _is_done(self) -> bool:
        """Whether nothing is left to do for this run."""
        return self.start.step >= self.config.train.train_steps and not self._owed

    def fit(self) -> None:
        """Train from the present step to `train_steps`."""
        train, first, last = self.config.train, self.start.step, self.config.train.train_steps
        if self._is_done:
            self._already_done(first, last)
            return
        own = self.config.run_dir if self.runtime.is_main else None
        self.goodput = self.measurements.goodput = Goodput(own, first, self._began, self.console.warn)
        self.log = MetricLog(self.config, first, self.console.warn, self.wandb) if self.runtime.is_main else None
        self.measurements.log = self.log
        self._history = self.new_history()
        self._done, self._under_way = first, 0
        self.metrics = DeferredMetrics(
            self.config,
            self.runtime,
            first,
            self._record,
            check=lambda rows: self.skipped.check(rows, self._done),
            tokens=lambda step: self._data_position(step).tokens,
        )
        self.console.header(self.config, self.runtime, first)
        with ExitStack() as stack:
            stack.callback(self._close_files)
            if self.runtime.is_main:
                stack.enter_context(pushing(self.config, self.start.store, self.console.warn))
            self.start.store.unwritten = self.console.warn
            self.start.store.write_with_others(self.runtime.process_index, self.runtime.process_count)
            if self.runtime.is_main:
                self.start.store.remove_remainders()
            self._stop = stack.enter_context(StopSignal(self.runtime.hosts, self._finishing))
            self._bar = stack.enter_context(self.console.training(first, last))
            self.watchdog = stack.enter_context(
                Watchdog(train.hang_timeout, lambda: f"step {self._under_way}", self.runtime.hosts)
            )
            self.measurements.pulse, self.measurements.progress = self._pulse, self._bar.progress
            stack.enter_context(stopping_after(train.stop_after))
            stack.enter_context(watching_notices(self.runtime))
            self._make_up(first)
            if first < last:
                self._train(first, last, stack)
        self._finish()

    def _make_up(self, first: int) -> None:
        """Validate before the first step of a run; of one that goes on, make up for what was due at its checkpoint."""
        with suppress(CutShort):
            for kind in self._owed if first else [VALIDATION]:
                self.measurements.make(kind, first)
        if self._stop.stops_here():
            where = f"at step {first}" if first else "before the first step"
            self._stop.leave(f"stopped {where}; the same command {'continues from' if first else 'starts'} there")

    def _train(self, first: int, last: int, stack: ExitStack) -> None:
        batches = stack.enter_context(self.batches_ahead(last))
        stack.push(self._record_rest)
        self.metrics.input_seconds = lambda: batches.seconds_waited
        stack.enter_context(self.runtime.watch())
        stack.enter_context(self.runtime.hosts)  # the last: others hear of an error before anything is closed
        self.goodput.begins_steps()
        for done, tokens in enumerate(batches, start=first + 1):
            self._one_step(done, tokens)
            if self._stop.stops_here():
                self._save(done)
                self.start.store.wait()
                self._stop.leave(f"stopped at step {done}; the same command continues from there")

    def _pulse(self) -> None:
        """Called at each batch of what is measured between two steps."""
        self.watchdog.beat()
        if self._stop.stops_here():
            raise CutShort

    def _finishing(self) -> str:
        """What is finished before a run that was asked to stop ends."""
        if not self._under_way:
            return "stopping before the first step"
        return f"finishing step {self._under_way} and saving"

    def new_history(self) -> Tensor:
        """Room for the metrics of `log_interval` steps; see `TrainStep`."""
        return self.runtime.place_like(torch.zeros(self.config.logging.log_interval, len(METRICS)), None)

    def batches_ahead(self, last: int) -> AbstractContextManager[Prefetcher[Tensor]]:
        """The batches of the steps from the present one to `last`, read and placed by threads ahead of them."""
        depth, threads = self.config.data.prefetch_batches, self.batches.threads
        return pipeline(self._read, self.runtime.place_batch, self.start.step, last, depth, threads)

    def update(self, done: int, tokens: Tensor, history_NM: Tensor) -> Tensor:
        """Make update number `done` (from 1), and nothing else; returns the new history."""
        if self.config.model.dropout > 0:
            self.runtime.seed(step_seed(self.config.train.seed, done))
        result: Tensor = self._train_step(tokens, history_NM)
        return result

    def _one_step(self, done: int, tokens: Tensor) -> None:
        """Make update number `done` (from 1), and what is due after it."""
        self._under_way = done
        self.watchdog.beat()
        began = time.perf_counter()
        self._history = self.update(done, tokens, self._history)
        self._done = done
        self.start.store.check()
        due = self.measurements.due(done)
        saves = is_due(self.config.checkpoint.save_interval, done, self.config.train.train_steps) or self._owes_save()
        pauses = bool(due) or saves
        if done == self.start.step + 1:
            with self.runtime.planned():
                self.runtime.wait()  # so that compiling is not counted as training
            self.metrics.clock.restart(done)
            self.goodput.first_step(time.perf_counter() - began)
        if done - self.metrics.read_until == self.config.logging.log_interval or pauses:
            self.metrics.request(self._history, done)
            self.metrics.collect(leave=0 if pauses else 1)
        with suppress(CutShort):  # the state is saved at once, and the rest made up for after the next start
            for kind in (kind for kind in due if kind != SAMPLE):
                self.measurements.make(kind, done)
            if saves:
                self._save(done)
            if SAMPLE in due:
                self.measurements.make(SAMPLE, done)
        if pauses:
            self.metrics.clock.restart(done)
        self.guard.check(done)
        self._bar.advance(done)

    def _owes_save(self) -> bool:
        """Whether a save that failed is tried again before the next is due; several processes would have to agree on it."""
        return self.start.store.owes and self.runtime.process_count == 1

    def _read(self, step: int) -> np.ndarray:
        """This process's rows of a step's batch `[rows, micro-batches, T + 1]`."""
        train = self.config.train
        rows = self._rows
        wanted = (rows[:, None] + np.arange(train.gradient_accum_step)[None] * train.train_batch_size).reshape(-1)
        tokens = self.batches.rows(step - self.start.step, wanted)
        return tokens.reshape(len(rows), train.gradient_accum_step, -1)

    def _data_position(self, done: int) -> DataPosition:
        """The position in the data after update `done`."""
        steps = done - self.start.step
        tokens = self.data_position.tokens + steps * self.config.tokens_per_step
        return replace(self.data_position, tokens=tokens, position=self.batches.position(steps))

    def _share(self, batch_size: int) -> float:
        """Fraction of a batch's rows that this process reads."""
        return len(self.runtime.rows(batch_size)) / batch_size

    def _record(self, rows: list[Row]) -> None:
        self.goodput.count(rows)
        if self.log is not None:
            self.log.write(rows, kind="train")
        self._bar.show(rows[-1])

    def _record_rest(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        """After an error of the run itself, record the steps since the last fetch, which may show its cause.

        Not if there are several processes: the others might not take part, and the fetch would wait for them.
        """
        if kind is not None and issubclass(kind, UserError) and self.runtime.process_count == 1:
            self.metrics.request(self._history, self._done)
            self.metrics.record_all()

    def _save(self, done: int) -> None:
        """Write the state after update `done`. Metrics up to there are on disk before the checkpoint is complete."""
        self.metrics.request(self._history, done)
        self.metrics.collect()
        with self.goodput.spending("saving"):
            self._copy_and_write(done)
        self.goodput.keep(done)

    def _copy_and_write(self, done: int) -> None:
        if self.log is not None:
            self.log.flush()
        if self.skipped.in_a_row and self.measurements.measured[0] != done:
            self.console.warn(
                f"the checkpoint of step {done} is left out: its last update was skipped, so nothing shows yet that the "
                "weights are good"
            )
            return
        patience = LAST_PATIENCE if done == self.config.train.train_steps else 0.0
        if not self.start.store.is_ready(patience):  # before the copy, so that there are never two
            return
        shards = list(unstack_shards(self.runtime.own_shards(self.step.named_state())))
        measured, loss = self.measurements.measured
        info = CheckpointInfo(
            done,
            loss if measured == done else None,  # a loss of other weights does not count
            self.data_fingerprint,
            redacted_tree(self.config.model_dump(mode="json")),
            seen=self._data_position(done),
            tokenizer=self.tokenizer_fingerprint,
        )
        self.start.store.save(shards, info)

    def _close_files(self) -> None:
        try:
            self.start.store.close()
        finally:
            self.goodput.close()
            if self.log is not None:
                self.log.close()

    def _already_done(self, first: int, last: int) -> None:
        """Leave a finished run as it is, except that a missing summary (it was killed before) is written."""
        made = f"its {last} steps" if first == last else f"{first} steps, and --train-steps is {last}"
        self.console.note(f"this run has already made {made}; raise --train-steps to continue")
        self.start.store.close()
        if self.runtime.is_main:
            with pushing(self.config, self.start.store, self.console.warn):
                pass  # what is missing because the run was killed before
            if summarised_steps(self.config.run_dir) != first:
                self.goodput = Goodput(self.config.run_dir, first, self._began, writes=False)
                self._summarise(first)

    def _finish(self) -> None:
        """Write `summary.json` and `loss.png`, and print the last lines."""
        self.runtime.hosts.barrier("the last step")
        if self.runtime.is_main:
            self.console.summary(self._summarise(self.config.train.train_steps), self.config.run_dir)

    def _summarise(self, steps: int) -> dict[str, Any]:
        """Write `summary.json` and `loss.png` of a run that has made `steps` steps."""
        summary = {
            "steps": steps,
            "tokens": self._data_position(steps).tokens,
            "parameters": parameter_count(self.config.model),
            "seconds": round(time.time() - self._began, 1),
            "resumed_from_step": self.start.step or None,
            "runtime": self.runtime.name,
            "device": self.runtime.device_name,
            "devices": self.runtime.device_count,
            "mesh": self.runtime.mesh,
            **self.goodput.summary(),
            **self.guard.summary(),
        }
        summary = write_report(self.config.run_dir, summary, self.console.warn)
        if self._records is not None:
            self._records.send()
        return summary


def _open(config: RunConfig, directory: str, split: Split) -> TokenDataset:
    return open_dataset(directory, config.model.seq_length, config.model.vocab_size, split=split, settings=config.data)
