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
from pretrain_xla.data.dataset import TokenDataset, open_dataset
from pretrain_xla.data.locate import Split
from pretrain_xla.data.prefetch import pipeline
from pretrain_xla.data.tokenizer import load_tokenizer
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import Evaluation, Settings, ValidationLoss
from pretrain_xla.interop.upload import Uploader
from pretrain_xla.model import flops_per_token, initialize, parameter_count
from pretrain_xla.model.stacked import of_each_layer
from pretrain_xla.redact import redacted_tree
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.build import arrange, build_examples, build_model, build_optimizer
from pretrain_xla.train.checkpoint import CheckpointInfo
from pretrain_xla.train.console import Console
from pretrain_xla.train.files import tokenizer_of
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

        valid_data = _open(config, config.data.valid_dir, "valid")
        # Evaluation needs no training data, and a run is often tested where there is none.
        train_data = valid_data if train.do_test else _open(config, config.data.train_dir, "train")
        self.data_fingerprint = train_data.fingerprint
        self.batches = Batches(
            train_data,
            sequences_per_batch=config.sequences_per_step,
            seq_length=model.seq_length,
            seed=train.seed,
            shuffle=True,
            shuffle_window=config.data.shuffle_window,
            drop_last=config.data.drop_last,
            steps=train.train_steps,
            share=self._share(train.train_batch_size),
        )
        valid_batches = Batches(
            valid_data,
            sequences_per_batch=train.eval_batch_size,
            seq_length=model.seq_length,
            seed=0,
            shuffle=False,
            shuffle_window=1,
            once=True,
            steps=train.valid_steps,
            share=self._share(train.eval_batch_size) * (2 + train.train_steps // train.valid_interval),
        )
        examples, valid_examples = build_examples(config, train_data), build_examples(config, valid_data)
        self.start: Start = find_start(config, self.data_fingerprint, self.console.note)
        self.model = build_model(config, runtime)
        if self.start.step == 0 and not self.start.tensors:
            initialize(self.model, train.seed)
        else:
            self.start.load_model(self.model)
        arrange(self.model)
        runtime.place_model(self.model)
        self.optimizer = build_optimizer(
            config,
            self.model,
            lambda name, parameter: runtime.place_like(self.start.optimizer_tensor(name, parameter), parameter),
        )
        self.step = TrainStep(self.model, self.optimizer, runtime, config, examples)
        self.start.load_loss_scale(self.step.loss_scale)
        self._train_step = runtime.compile(self.step, "train", state=self.step.state)
        self.validation = ValidationLoss(
            self.model,
            self.step.forward,
            valid_batches,
            runtime,
            train.valid_steps,
            config.data.prefetch_batches,
            valid_examples,
        )
        self.evaluation = None if train.do_test else self._read_tasks()
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
            self._push_to_hub(stack)
            stop = stack.enter_context(StopSignal(enabled=self.runtime.process_count == 1))
            self._bar = stack.enter_context(self.console.training(first, last))
            if first == 0:
                self._validate(0)
            depth, threads = self.config.data.prefetch_batches, self.batches.threads
            ahead = pipeline(self._read, self.runtime.place_batch, first, last, depth, threads)
            batches = stack.enter_context(ahead)
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
        train = self.config.train
        if self.config.model.dropout > 0:
            self.runtime.seed(_step_seed(train.seed, done))
        self._history = self._train_step(tokens, self._history)
        validates = self._due(train.valid_interval, done)
        evaluates = self.evaluation is not None and self._due(self.config.evaluation.eval_interval, done)
        saves = self._due(self.config.checkpoint.save_interval, done)
        samples = self.samples is not None and self._due(self.config.logging.sample_interval, done)
        pauses = validates or evaluates or saves or samples
        if done == self.start.step + 1:
            with self.runtime.planned():
                self.runtime.wait()  # so that compiling is not counted as training
            self._clock.restart(done)
        if done - self._read_until == self.config.logging.log_interval or pauses:
            self._request_metrics(done)
            self._collect_metrics(leave=0 if pauses else 1)
        if validates:
            with self.runtime.planned():
                self._validate(done)
        if evaluates:
            self._evaluate(done)
        if saves:
            self._save(done)
        if samples:
            with self.runtime.planned():
                self._sample(done)
        if pauses:
            self._clock.restart(done)
        self.guard.check(done)
        self._bar.advance(done)

    def _due(self, interval: int | None, done: int) -> bool:
        """Whether what comes every so many steps, and after the last one, comes now."""
        return done == self.config.train.train_steps or (interval is not None and done % interval == 0)

    def _read(self, step: int) -> np.ndarray:
        """This process's rows of a step's batch `[rows, micro-batches, T + 1]`."""
        train = self.config.train
        rows = self._rows
        wanted = (rows[:, None] + np.arange(train.gradient_accum_step)[None] * train.train_batch_size).reshape(-1)
        tokens = self.batches.rows(step, wanted)
        return tokens.reshape(len(rows), train.gradient_accum_step, -1)

    def _share(self, batch_size: int) -> float:
        """Part of a batch's rows that this process reads."""
        return len(self.runtime.rows(batch_size)) / batch_size

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

    def _evaluate(self, done: int) -> None:
        """Score the tasks of the config; a score is called `task/score` in the metrics."""
        assert self.evaluation is not None
        results = self.evaluation(self._bar.progress)
        scores = {f"{result.task}/{name}": value for result in results for name, value in result.scores.items()}
        row: Row = {"step": done, **scores}
        if self.log is not None:
            self.log.write([row], kind="evaluation")
        self.console.evaluation(row)

    def _read_tasks(self) -> Evaluation | None:
        """The tasks to score in the loop, read and tokenized now, so that what is missing is missed before training."""
        config = self.config.evaluation
        if not config.eval_tasks:
            return None
        return Evaluation(
            self.model,
            self.runtime,
            lambda: load_tokenizer(tokenizer_of(self.config.data)),
            config.eval_tasks,
            Settings(config.eval_data, config.eval_limit, config.eval_stride, self.config.data.valid_dir),
            batch_size=self.config.train.eval_batch_size,
            top_k=config.eval_top_k,
        )

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
            config = redacted_tree(self.config.model_dump(mode="json"))
            info = CheckpointInfo(done, self._valid_loss, self.data_fingerprint, config)
            self.start.store.save(of_each_layer(host), info)

    def _push_to_hub(self, stack: ExitStack) -> None:
        """Have each checkpoint pushed, where that is asked for; the stack waits for the last one."""
        repository, config = self.config.checkpoint.hub_repo, self.config
        if repository is not None and self.runtime.is_main:
            uploader = Uploader(repository, config.run_dir, self.start.store, self.console.warn)
            stack.callback(uploader.close)
            stack.callback(self.start.store.wait)  # before the uploader closes: the last checkpoint comes from there

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


def _open(config: RunConfig, directory: str, split: Split) -> TokenDataset:
    return open_dataset(directory, config.model.seq_length, config.model.vocab_size, split=split, settings=config.data)


def _step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a pure function of the run's seed and the step, so that a resumed run draws the same."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**62
