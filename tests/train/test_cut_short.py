"""A stop cuts a validation, an evaluation or a sample short, and the next start makes up for it: no gap, and nothing twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import Interrupted
from pretrain_xla.evaluate import Evaluation, ValidationLoss
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.metrics import read_metrics
from pretrain_xla.train.measurements import Measurements
from pretrain_xla.train.run import run
from pretrain_xla.train.samples import Samples

RESULTS = ("step", "loss", "grad_norm", "valid_loss", "shards/loss")


class Killed(Exception):
    """The process was killed."""


def disturbed(monkeypatch: pytest.MonkeyPatch, part: type, step: int, *, kills: bool) -> None:
    """Ask the run to stop, or kill it, in a part of what is due at a step, once its first batch has been read."""
    plain_make, plain_call, now = Measurements.make, part.__call__, list[int]()

    def make(self: Measurements, kind: str, done: int) -> None:
        now[:] = [done]
        plain_make(self, kind, done)

    def call(self: Any, progress: Any, *rest: Any) -> Any:
        if now == [step] and kills:
            raise Killed
        if now == [step]:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_call(self, progress, *rest)

    monkeypatch.setattr(Measurements, "make", make)
    monkeypatch.setattr(part, "__call__", call)


def results(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in RESULTS) for row in read_metrics(str(folder / "metrics.jsonl"))]


def drawn(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points that TensorBoard shows."""
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_what_was_due_is_made_up_for(
    make_config: Callable[..., RunConfig],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def config(name: str) -> RunConfig:
        return make_config(
            model={"vocab_size": 257},
            data={"tokenizer": "bytes"},
            train={
                "train_steps": 6,
                "valid_steps": 3,
                "valid_interval": 3,
                "train_batch_size": 2,
                "eval_batch_size": 2,
            },
            checkpoint={"save_interval": 3},
            evaluation={"eval_tasks": ("shards",), "eval_interval": 3},
            logging={"run_dir": str(tmp_path / name), "log_interval": 2, "sample_interval": 3, "tensorboard": True},
        )

    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    run(config("undisturbed"))
    disturbances: list[tuple[type, int, bool, set[int]]] = [
        (ValidationLoss, 0, False, set()),
        (ValidationLoss, 3, False, {0}),
        (Evaluation, 3, False, {0, 3}),  # while it makes up for what was cut short
        (Samples, 3, True, {0, 3}),
        (ValidationLoss, 6, False, {0, 3}),
        (Samples, 6, False, {0, 3, 6}),  # there are no more steps to make
    ]
    for part, step, kills, validated in disturbances:
        with monkeypatch.context() as patch:
            disturbed(patch, part, step, kills=kills)
            with pytest.raises(Killed if kills else Interrupted):
                run(config("run"))
        where = (
            f"at step {step}; the same command continues from"
            if step
            else "before the first step; the same command starts"
        )
        assert kills or CheckpointStore(str(folder / "checkpoints"), 9).newest() == (step or None), where
        assert {row[0] for row in results(folder) if row[3] is not None} == validated, (part, step)
    run(config("run"))
    assert results(folder) == results(undisturbed)
    assert (folder / "samples.txt").read_text() == (undisturbed / "samples.txt").read_text()
    for name in ("validation/valid_loss", "evaluation/shards/loss", "train/loss"):
        assert drawn(folder, name) == drawn(undisturbed, name), name
    summary = json.loads((folder / "summary.json").read_text())
    # The first start was stopped before its first step, and left no checkpoint to go on from.
    assert summary["starts"] == 6
    assert 0 < summary["goodput"] < 1
    assert sum(summary["wall_seconds_in"].values()) == pytest.approx(summary["wall_seconds"], abs=1.0)
    capfd.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(config("run"))
    assert "this run has already made its 6 steps" in capfd.readouterr().out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
