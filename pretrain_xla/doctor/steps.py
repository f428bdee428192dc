"""Some steps of a run, made by the trainer itself on random tokens: how long it compiles, how long a step takes.

Nothing is saved, validated or sent anywhere. The tokens are random, because a step costs the same for all tokens; so no data is
needed, and every host makes the same ones.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.doctor.check import Figures
from pretrain_xla.model.flops import flops_per_token, parameter_count
from pretrain_xla.run_folder.metrics import Row
from pretrain_xla.runtime import start
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.train.deferred_metrics import DeferredMetrics
from pretrain_xla.train.graph_guard import GraphGuard
from pretrain_xla.train.trainer import Trainer

GROUP = 5
"""Steps between two looks at the clock; the first group, with the compilation, does not count."""
MOST_TOKENS = 2**26


def short_run(config: RunConfig, steps: int, folder: str) -> RunConfig:
    """The config of a run of a few steps with the same step, and nothing around it."""
    train = config.train
    tree = config.model_dump()
    data: dict[str, Any] = {
        "train_dir": os.path.join(folder, "train"),
        "valid_dir": os.path.join(folder, "valid"),
        "cache_dir": None,
    }
    if config.data.separate_documents:
        data["end_of_text"] = config.data.end_of_text or 0
    changes: dict[str, dict[str, Any]] = {
        "data": data | {"tokenizer": None, "drop_last": False},
        "train": {
            "train_steps": steps,
            "valid_steps": 1,
            "eval_batch_size": train.train_batch_size,
            "from_checkpoint": None,
            "weights_only": False,
            "mode": "train",
            "hang_timeout": None,
            "stop_after": None,
            "strict_graph": False,
        },
        "evaluation": {"eval_tasks": ()},
        "parallel": {"mp_start_method": None},
        "checkpoint": {"checkpoints_dir": os.path.join(folder, "checkpoints"), "hub_repo": None, "resume": True},
        "logging": {"run_dir": folder, "sample_interval": None, "tensorboard": False, "log_interval": GROUP},
        "wandb": {"wandb_logging": False},
    }
    return build_config({name: section | changes.get(name, {}) for name, section in tree.items()}, "doctor")


def write_tokens(config: RunConfig, folder: str, steps: int) -> None:
    """Random tokens for training and validation: for all steps if they are not too many, and at least for one."""
    length, vocabulary = config.model.seq_length + 1, config.model.vocab_size
    for split, batches in (("train", steps), ("valid", 1)):
        count = min(max(batches * config.sequences_per_step * length, length), MOST_TOKENS)
        count = max(count, config.sequences_per_step * length)
        path = Path(folder) / split
        path.mkdir()
        kind = np.uint16 if vocabulary <= 2**16 else np.uint32
        np.save(path / "000.npy", np.random.default_rng(0).integers(0, vocabulary, count, dtype=kind))


def measure_steps(config: RunConfig, steps: int, hosts: Hosts) -> Figures:
    """Make the steps of a `short_run` whose tokens are written."""
    graph_events: list[str] = []
    rows: list[Row] = []
    began = time.perf_counter()
    with contextlib.closing(start(config, hosts)) as runtime:
        opened = time.perf_counter()
        trainer = Trainer(config, runtime)
        guard = GraphGuard(runtime, strict=False, say=graph_events.append)
        metrics = DeferredMetrics(config, runtime, 0, rows.extend, check=lambda _rows: None, tokens=lambda _step: 0)
        history_NM, built = trainer.new_history(), time.perf_counter()
        marks: list[float] = []
        with trainer.batches_ahead(steps) as batches, runtime.watch():
            for done, tokens in enumerate(batches, start=1):
                history_NM = trainer.update(done, tokens, history_NM)
                if done == 1 or done % GROUP == 0:
                    with runtime.planned():
                        runtime.wait()
                    marks.append(time.perf_counter())
                    metrics.request(history_NM, done)
                guard.check(done)
            input_seconds = batches.seconds_waited
        memory = runtime.memory_bytes()
        metrics.collect()
        groups = [(later - earlier) / GROUP for earlier, later in itertools.pairwise(marks[1:])]
        step = statistics.median(groups)
        rate = config.tokens_per_step / step
        peak = runtime.peak_flops
        return {
            "device": runtime.device_name,
            "devices": runtime.device_count,
            "mesh": runtime.mesh,
            "attention": runtime.attention,
            "parameters": parameter_count(config.model),
            "tokens_per_step": config.tokens_per_step,
            "steps": steps,
            "open_seconds": opened - began,
            "build_seconds": built - opened,
            "first_step_seconds": marks[0] - built,
            "compile_seconds": runtime.graph_counts().compile_seconds,
            "step_seconds": step,
            "fastest_seconds": min(groups),
            "slowest_seconds": max(groups),
            "input_seconds": input_seconds,
            "tokens_per_second": rate,
            "mfu": None if peak is None else rate * flops_per_token(config.model) / (peak * runtime.device_count),
            "memory_bytes": memory,
            "losses": [row["loss"] if math.isfinite(row["loss"]) else None for row in rows],
            "graph_events": graph_events,
        }
