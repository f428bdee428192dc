"""What to change if a step does not fit; each change is tried by compiling it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.preflight.report import Report
from pretrain_xla.preflight.trials import Compiler, Trial

CHUNK = 2048
"""Tokens whose logits exist at a time when chunking is tried: large enough for efficient matrix products."""


def remedies(config: RunConfig, report: Report) -> Iterator[dict[str, Any]]:
    """Changes (setting → value) that need less memory and do not change the training result, the fastest first."""
    train = config.train
    devices = report.mesh["data"] * report.mesh["fsdp"]
    rows = train.train_batch_size // devices
    for shrink in (2, 4, 8):
        if rows % shrink == 0:
            yield {
                "train_batch_size": train.train_batch_size // shrink,
                "gradient_accum_step": train.gradient_accum_step * shrink,
            }
    tokens = rows * config.model.seq_length
    if min(train.loss_chunk or tokens, tokens) > CHUNK:
        yield {"loss_chunk": CHUNK}
    if train.rematerialization == "none":
        yield {"rematerialization": "selective"}
    if train.rematerialization != "full":
        yield {"rematerialization": "full"}
    if report.mesh["data"] > 1:
        yield {"mesh_data": 1, "mesh_fsdp": devices}


def suggest(config: RunConfig, report: Report, compiler: Compiler) -> list[Trial]:
    """Try each remedy alone; smaller batches only until one fits."""
    tried: list[Trial] = []
    changes = list(remedies(config, report))
    compiler.expect(len(changes))
    for number, change in enumerate(changes):
        smaller_fits = any(trial.fits and "train_batch_size" in trial.changes for trial in tried)
        if "train_batch_size" in change and smaller_fits:
            continue
        compiler.expect(len(changes) - number)
        tried.append(compiler.attempt(config, change))
    return tried
