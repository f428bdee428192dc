"""The loop: batches in, updates, and now and then a validation, a reading of the metrics and a checkpoint.

The device never waits for the loop. Batches are copied ahead of the step by a thread; metrics are read `log_interval` steps at
a time by another, at least one reading behind; checkpoints are copied to the host and written by a third.
"""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.data.prefetch import Prefetcher
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import ValidationLoss
from pretrain_xla.model import flops_per_token, initialize, parameter_count
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.build import build_model, build_optimizer
from pretrain_xla.train.checkpoint import CheckpointInfo
from pretrain_xla.train.console import Console
from pretrain_xla.train.guard import GraphGuard
from pretrain_xla.train.metrics import MetricLog, Row, read_metrics
from pretrain_xla.train.report import perplexity, plot_loss, summarise, write_summary
from pretrain_xla.train.resume import Start, find_start
from pretrain_xla.train.samples import Samples
from pretrain_xla.train.signals import StopSignal
from pretrain_xla.train.step import METRICS, TrainStep


class Trainer:
    """One run on one process. Construct it (everything that can be refused is refused there), then `fit` or `evaluate`."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        train, model = config.train, config.model
        self.console = Console(enabled=runtime.is_main)
        self._rows = runtime.rows(train.train_batch_size)

        valid_data = open_dataset(config.data.valid_dir, model.seq_length, model.vocab_size)
        # Evaluation needs no training data, and a run is often tested where there is none.
        train_data = (
            valid_data if train.do_test else open_dataset(config.data.train_dir, model.seq_length, model.vocab_size)
        )
        self.data_fingerprint = train_data.fingerprint
        self.batches = Batches(
            train_data,
            sequences_per_batch=config.sequences_per_step,
            seq_length=model.seq_length,
            seed=train.seed,
            shuffle=True,
            shuffle_window=config.data.shuffle_window,
            drop_last=config.data.drop_last,
        )
        valid_batches = Batches(
            valid_data,
            sequences_per_batch=train.eval_batch_size,
            seq_length=model.seq_length,
            seed=0,
            shuffle=False,
            shuffle_window=1,
            drop_last=False,
        )
        self.start: Start = find_start(config, self.data_fingerprint, self.console.note)
        self.model = build_model(config, runtime)
        if self.start.step == 0 and not self.start.tensors:
            initialize(self.model, train.seed)
        else:
            self.start.load_model(self.model)
        runtime.place_model(self.model)
        self.optimizer = build_optimizer(
            config,
            self.model,
            lambda name, parameter: runtime.place_like(self.start.optimizer_tensor(name, parameter), parameter),
        )
        self.step = TrainStep(self.model, self.optimizer, runtime, config)
        self.start.load_loss_scale(self.step.loss_scale)
        self._train_step = runtime.compile(self.step, "train", state=self.step.state)
        self.validation = ValidationLoss(
            self.model, self.step.forward, valid_batches, runtime, train.valid_steps, config.data.prefetch_batches
        )
        writes = config.logging.sample_interval is not None and not train.do_test
        self.samples = Samples(config, self.model, runtime) if writes else None
        self.guard = GraphGuard(runtime, strict=train.strict_graph, say=self.console.warn)
        self.start.release()

    def evaluate(self) -> float:
        """Print loss and perplexity on `valid_dir`; returns the loss."""
        with self.console.progress("evaluating", self.validation.steps) as advance:
            loss = self.validation(advance)
        self.console.print("** Testing results **")
        self.console.print(f"Loss: {loss:.6f}")
        self.console.print(f"Perplexity: {perplexity(loss):.4f}")
        return loss

    def fit(self) -> None:
        """Train to `train_steps`, from wherever the run stands."""
        train = self.config.train
        first, last = self.start.step, train.train_steps
        self.log = MetricLog(self.config, first) if self.runtime.is_main else None
        self._history = self.runtime.place_like(torch.zeros(self.config.logging.log_interval, len(METRICS)), None)
        self._pending: deque[_Reading] = deque()
        self._read_until = first
        self._valid_loss = self.start.valid_loss
        self._began = time.perf_counter()
        self.console.header(self.config, self.runtime, first)
        with ExitStack() as stack:
            stack.callback(self._close_files)
            if first >= last:
                self.console.note(f"this run has already made its {last} steps; raise --train-steps to go on")
            stop = stack.enter_context(StopSignal(enabled=self.runtime.process_count == 1))
            self._bar = stack.enter_context(self.console.training(first, last))
            if first == 0:
                self._validate(0)
            batches = stack.enter_context(Prefetcher(self._place, first, last, self.config.data.prefetch_batches))
            self._input, self._clock = batches, _Clock()
            stack.enter_context(self.runtime.watch())
            for done, tokens in enumerate(batches, start=first + 1):
                self._one_step(done, tokens)
                if stop.signal is not None:
                    self._save(done)
                    self.start.store.wait()
                    stop.leave(f"stopped at step {done}; the same command continues from there")
        self._finish()

    def _one_step(self, done: int, tokens: Tensor) -> None:
        """Make update number `done` (from 1) and whatever is due after it."""
        train, last = self.config.train, self.config.train.train_steps
        if self.config.model.dropout > 0:
            self.runtime.seed(_step_seed(train.seed, done))
        self._history = self._train_step(tokens, self._history)
        validates = done % train.valid_interval == 0 or done == last
        saves = done % self.config.checkpoint.save_interval == 0 or done == last
        if done == self.start.step + 1:
            with self.runtime.planned():
                self.runtime.wait()  # so that compiling is not counted as training
            self._clock.restart(done)
        if done - self._read_until == self.config.logging.log_interval or validates or saves:
            self._request_metrics(done)
            self._collect_metrics(leave=0 if validates or saves else 1)
        if validates:
            with self.runtime.planned():
                self._validate(done)
        if saves:
            self._save(done)
        samples = self.samples is not None and (done % (self.config.logging.sample_interval or 1) == 0 or done == last)
        if samples:
            with self.runtime.planned():
                self._sample(done)
        if validates or saves or samples:
            self._clock.restart(done)
        self.guard.check(done)
        self._bar.advance(done)

    def _place(self, step: int) -> Tensor:
        """This process's rows of a step's batch `[rows, micro-batches, T + 1]`, on the device."""
        train = self.config.train
        rows = np.arange(train.train_batch_size)[self._rows]
        wanted = (rows[:, None] + np.arange(train.gradient_accum_step)[None] * train.train_batch_size).reshape(-1)
        tokens = self.batches.rows(step, wanted)
        return self.runtime.place_batch(tokens.reshape(len(rows), train.gradient_accum_step, -1))

    def _request_metrics(self, done: int) -> None:
        count = done - self._read_until
        if count:
            self._pending.append(_Reading(self.runtime.fetch(self._history), self._read_until, count))
            self._read_until = done

    def _collect_metrics(self, leave: int) -> None:
        """Write the readings that have arrived; wait for all but the newest `leave` of them."""
        while len(self._pending) > leave:
            reading = self._pending.popleft()
            with self.runtime.planned():
                values_NM = reading.future.result()[-reading.count :].tolist()
            rows = [
                {"step": reading.before + 1 + index, **dict(zip(METRICS, values, strict=True))}
                for index, values in enumerate(values_NM)
            ]
            self._add_rates(rows, reading.arrived)
            for row in rows:
                if not math.isfinite(row["loss"]):
                    raise UserError(
                        f"step {row['step']}: the loss is {row['loss']}: lower --learning-rate, raise --warmup-steps or set "
                        "--max-grad-norm 1.0; if it comes back at once, remove the newest step_ folder of "
                        f"{self.config.checkpoints_dir}, which may hold the ruined weights"
                    )
            if self.log is not None:
                self.log.write(rows, kind="train")
            self._bar.show(rows[-1])

    def _add_rates(self, rows: list[Row], arrived: float) -> None:
        """To the last row of a reading, what is measured over the whole of it."""
        row = rows[-1]
        row["perplexity"] = perplexity(row["loss"])
        row["tokens"] = row["step"] * self.config.tokens_per_step
        seconds, steps = self._clock.since(row["step"], arrived)
        if steps:
            rate = steps * self.config.tokens_per_step / seconds
            row["tokens_per_second"] = round(rate, 1)
            if self.runtime.peak_flops is not None:
                flops = rate * flops_per_token(self.config.model)
                row["mfu"] = flops / (self.runtime.peak_flops * self.runtime.device_count)
        row["memory_gb"] = round(self.runtime.memory_bytes() / 1e9, 3)
        row["input_seconds"] = round(self._input.seconds_waited, 3)
        row["compile_seconds"] = round(self.runtime.graph_counts().compile_seconds, 3)

    def _validate(self, done: int) -> None:
        self._valid_loss = self.validation()
        row = {"step": done, "valid_loss": self._valid_loss, "valid_perplexity": perplexity(self._valid_loss)}
        if self.log is not None:
            self.log.write([row], kind="validation")
        self.console.validation(row)

    def _sample(self, done: int) -> None:
        assert self.samples is not None
        text = self.samples()
        if self.log is not None:
            self.log.write_sample(done, text)

    def _save(self, done: int) -> None:
        """Write the state after update `done`; metrics up to there are on disk before it counts."""
        self._request_metrics(done)
        self._collect_metrics(leave=0)
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state.items()}
        if self.step.loss_scale is not None:
            tensors |= {f"loss_scale.{name}": value for name, value in self.step.loss_scale.state.items()}
        host = self.runtime.gather(tensors)
        if self.runtime.is_main:
            info = CheckpointInfo(done, self._valid_loss, self.data_fingerprint, self.config.model_dump(mode="json"))
            self.start.store.save(host, info)

    def _close_files(self) -> None:
        try:
            self.start.store.close()
        finally:
            if self.log is not None:
                self.log.close()

    def _finish(self) -> None:
        """`summary.json`, `loss.png`, and the closing words."""
        self.runtime.barrier()
        if self.log is None:
            return
        rows = read_metrics(self.log.path)
        model = self.config.model
        summary = {
            "steps": self.config.train.train_steps,
            "tokens": self.config.train.train_steps * self.config.tokens_per_step,
            "parameters": parameter_count(model),
            **summarise(rows),
            "seconds": round(time.perf_counter() - self._began, 1),
            "resumed_from_step": self.start.step or None,
            "runtime": self.runtime.name,
            "device": self.runtime.device_name,
            "devices": self.runtime.device_count,
            "mesh": self.runtime.mesh,
            **self.guard.summary(),
        }
        write_summary(self.config.run_dir, summary)
        plot_loss(self.config.run_dir, rows, f"{summary['parameters'] / 1e6:.1f}M parameters, {self.config.run_dir}")
        self.console.summary(summary, self.config.run_dir)


class _Reading:
    """Metrics on their way to the host: `count` steps after step `before`. The device was done when they `arrived`."""

    def __init__(self, future: Future[Tensor], before: int, count: int) -> None:
        self.future, self.before, self.count = future, before, count
        self.arrived = math.inf
        future.add_done_callback(self._stamp)

    def _stamp(self, _future: Future[Tensor]) -> None:
        self.arrived = time.perf_counter()


class _Clock:
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


def _step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a pure function of the run's seed and the step, so that a resumed run draws the same."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**62
