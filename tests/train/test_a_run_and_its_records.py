"""Which checkpoints a run keeps, with which loss, and that earlier runs' records are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.metrics import read_metrics
from pretrain_xla.train.graph_guard import GraphGuard
from pretrain_xla.train.run import run

Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: Make, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds configs of short runs; other keywords than those named here are settings of `train`."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def build(*, save_interval: int = 100, log_interval: int = 100, optim: Any = None, **train: Any) -> RunConfig:
        loop = {"train_batch_size": 2, "eval_batch_size": 2, "valid_steps": 1, "valid_interval": 100}
        config = make_config(
            train=loop | train,
            checkpoint={"save_interval": save_interval, "saved_checkpoint_limit": 9},
            optim={"warmup_steps": 1, "decay_steps": 50, "learning_rate": 1e-2, "min_lr": 1e-3} | (optim or {}),
        )
        return config.model_copy(
            update={"logging": config.logging.model_copy(update={"log_interval": log_interval, "tensorboard": False})}
        )

    return build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run's folder."""
    return tmp_path / "run"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(str(folder / "metrics.jsonl"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_checkpoint_carries_the_loss_of_its_own_weights(make: Make, folder: Path) -> None:
    run(make(train_steps=9, valid_interval=4, save_interval=3))
    run(make(train_steps=14, valid_interval=4, save_interval=1))
    measured = {row["step"]: row["valid_loss"] for row in rows_of(folder) if "valid_loss" in row}
    assert sorted(measured) == [0, 4, 8, 9, 12, 14]
    losses = CheckpointStore(str(folder / "checkpoints"), limit=9).losses()
    assert {10, 11, 12, 13, 14} <= set(losses)
    assert losses == {step: measured.get(step) for step in losses}


@pytest.mark.parametrize("intervals", [{}, {"save_interval": 3}, {"valid_interval": 3}, {"log_interval": 2}])
def test_the_rows_that_led_to_a_nan_loss_are_on_disk(intervals: dict[str, int], make: Make, folder: Path) -> None:
    diverging = {"learning_rate": 1e20, "min_lr": 1e20, "max_grad_norm": 0.0}
    many = r"\d+ updates in a row were skipped, from step \d+ on: the (loss|gradient norm) is"
    with pytest.raises(UserError, match=rf"step \d+: ({many}|the validation loss is) (nan|inf)") as caught:
        run(make(train_steps=12, optim=diverging, **intervals))
    assert "\n" not in str(caught.value)
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    failed_step = int(str(caught.value).removeprefix("step ").split(":")[0])
    assert len(rows) >= failed_step
    assert CheckpointStore(str(folder / "checkpoints"), limit=9).steps() == [], "no checkpoint of it is kept"


def test_an_evaluation_with_a_nan_loss_fails(make: Make, folder: Path) -> None:
    """Finite weights that give a loss of NaN."""
    run(make(train_steps=1))
    store = CheckpointStore(str(folder / "checkpoints"), limit=9)
    tensors = {
        name: torch.full_like(tensor, 3e38) for name, tensor in store.load(1).items() if name.startswith("model.")
    }
    store.save(tensors, replace(store.info(1), step=2))
    store.close()
    with pytest.raises(
        UserError, match="the loss is nan: the weights are damaged, or the compute precision is too low"
    ):
        run(make(do_test=True))


def test_rows_are_on_disk_when_a_run_stops_itself(make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_guard: GraphGuard, step: int) -> None:
        if step == 5:
            raise UserError("stopped")

    monkeypatch.setattr(GraphGuard, "check", check)
    with pytest.raises(UserError, match="stopped"):
        run(make(train_steps=12))
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_not_changed(make: Make, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make(train_steps=6, log_interval=2))
    before = contents(folder)
    assert json.loads(before["summary.json"])["steps"] == 6
    for steps, expected in ((6, "its 6 steps; raise"), (4, "6 steps, and --train-steps is 4; raise")):
        capsys.readouterr()
        run(make(train_steps=steps, log_interval=2))
        assert f"this run has already made {expected} --train-steps to continue" in capsys.readouterr().out
        assert contents(folder) == before
    (folder / "summary.json").unlink()  # as if killed between its last checkpoint and its summary
    run(make(train_steps=4, log_interval=2))
    complete, summary = json.loads(before["summary.json"]), json.loads((folder / "summary.json").read_text())
    same = ("steps", "tokens", "last_train_loss", "last_valid_loss", "tokens_per_second", "parameters")
    assert {key: summary[key] for key in same} == {key: complete[key] for key in same}


def test_no_record_of_an_earlier_run_is_lost(make: Make, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make(train_steps=4))
    (folder / "samples.txt").write_text("what it wrote")
    (folder / "events.out.tfevents.1.host").write_bytes(b"curves")
    first = contents(folder)
    shutil.rmtree(folder / "checkpoints")  # what --no-resume advises
    capsys.readouterr()
    run(make(train_steps=5))
    line = f"note: {folder} held the records of an earlier run; they are in {folder}/earlier_1 now"
    assert line in capsys.readouterr().out.splitlines()
    assert contents(folder / "earlier_1") == first
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == [1, 2, 3, 4, 5]
    second = contents(folder)
    other = make(train_steps=7)
    checkpoint = {"checkpoints_dir": str(folder / "others"), "resume": False}  # or this
    run(other.model_copy(update={"checkpoint": other.checkpoint.model_copy(update=checkpoint)}))
    assert contents(folder / "earlier_2") == second
    third = contents(folder)
    continued = make(train_steps=9, from_checkpoint=str(folder / "others"))
    checkpoint = {"checkpoints_dir": str(folder / "third")}
    run(continued.model_copy(update={"checkpoint": continued.checkpoint.model_copy(update=checkpoint)}))
    assert contents(folder / "earlier_3") == third
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == [8, 9]


def test_a_run_without_a_step_is_not_archived(make: Make, folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "valid_loss": 3.5}\n{"ste')
    run(make(train_steps=2))
    assert not list(folder.glob("earlier*"))
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 2]


def test_weights_only_of_a_finished_run(make: Make, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make(train_steps=4))
    first = CheckpointStore(str(folder / "checkpoints"), limit=9).load(4)

    def begin(name: str, **train: Any) -> dict[str, Any]:
        config = make(from_checkpoint=str(folder), **train)
        run(config.model_copy(update={"logging": config.logging.model_copy(update={"run_dir": str(folder / name)})}))
        return CheckpointStore(str(folder / name / "checkpoints"), limit=9).load(train["train_steps"])

    with pytest.raises(
        UserError, match=r"step_00000004 has made 4 steps, and --train-steps is 4: raise .*--weights-only"
    ):
        begin("refused", train_steps=4)
    assert not (folder / "refused").exists()
    second = begin("second", train_steps=1, weights_only=True)
    assert f"note: starting with the weights of {folder}" in capsys.readouterr().out
    assert int(second["optimizer.step"]) == 1
    assert [row["step"] for row in rows_of(folder / "second")] == [0, 1, 1]
    last = next(row["valid_loss"] for row in rows_of(folder) if row["step"] == 4 and "valid_loss" in row)
    assert rows_of(folder / "second")[0]["valid_loss"] == pytest.approx(last)
    assert any((first[name] != second[name]).any() for name in first if name.startswith("model."))
    assert int(begin("third", train_steps=5)["optimizer.step"]) == 5, "all of its state, by default"
    with pytest.raises(UserError, match="weights_only=True needs from_checkpoint"):
        make(train_steps=4, weights_only=True)
