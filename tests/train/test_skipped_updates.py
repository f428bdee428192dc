"""Runs that meet NaN: one bad batch, bad data without end, and weights that go bad while the loss is good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.optim import Optimizer
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.train import update_guard
from pretrain_xla.train.run import run
from pretrain_xla.train.step import TrainStep
from tests.faulty_loss import bad_loss

from .test_a_run_and_its_records import folder, make, rows_of

__all__ = ["folder", "make"]

Make = Callable[..., RunConfig]


class BadSteps:
    """Marks the batches of some steps with a token that makes the loss NaN.

    step: the last one made; to be set before a run that resumes.
    """

    def __init__(self) -> None:
        self.step, self.steps = 0, set[int]()

    def __call__(self, plain: Callable[..., Tensor], step: TrainStep, tokens_BAS: Tensor, history_NM: Tensor) -> Tensor:
        self.step += 1
        clean = tokens_BAS.clamp(max=35)
        if self.step in self.steps:
            clean[0, 0, 0] = 36
        return plain(step, clean, history_NM)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> BadSteps:
    """Of every run in this test."""
    bad_loss(monkeypatch, token=36)
    bad, plain = BadSteps(), TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda step, *arguments: bad(plain, step, *arguments))
    return bad


def saved(folder: Path) -> CheckpointStore:
    return CheckpointStore(str(folder / "checkpoints"), limit=9)


@pytest.mark.parametrize("sigma", [None, 6.0])
def test_a_bad_batch_costs_itself_alone(
    sigma: float | None, bad: BadSteps, make: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.steps = {4, 5, 8}
    settings: dict[str, Any] = {"save_interval": 5, "log_interval": 3, "spike_sigma": sigma, "spike_window": 4}
    run(make(train_steps=12, **settings))
    printed = capsys.readouterr().out
    assert "steps 4 to 5: 2 updates are skipped; of the first, of step 4, the loss is nan" in printed
    assert "step 8: the update is skipped: the loss is nan" in printed
    assert "the checkpoint of step 5 is left out: its last update was skipped" in printed
    rows = [row for row in rows_of(folder) if "loss" in row]
    marks = {row["step"]: (row.get("skipped"), row.get("skipped_in_a_row")) for row in rows}
    assert {step: mark for step, mark in marks.items() if mark != (None, None)} == {4: (1, 1), 5: (1, 2), 8: (1, 1)}
    assert [row["step"] for row in rows if math.isnan(row["loss"])] == [4, 5, 8]
    assert json.loads((folder / "summary.json").read_text())["skipped_updates"] == 3
    assert saved(folder).steps() == [10, 12]
    last = saved(folder).load(12)
    assert int(last["optimizer.step"]) == 9
    assert int(last["guard.skipped_in_a_row"]) == 0
    # Exactly the same again from the checkpoint, the guard's window included.
    (folder / "checkpoints" / "step_00000012" / "checkpoint.json").unlink()
    bad.step = 10
    run(make(train_steps=12, **settings))
    again = saved(folder).load(12)
    assert again.keys() == last.keys()
    for name, tensor in last.items():
        assert torch.equal(again[name], tensor), name
    assert [row for row in rows_of(folder) if "loss" in row][:10] == rows[:10]


def test_bad_data_without_end_stop_the_run_with_a_report(
    bad: BadSteps, make: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.steps = set(range(7, 99))
    settings: dict[str, Any] = {"save_interval": 2, "max_skipped_updates": 5, "log_interval": 2}
    with pytest.raises(UserError) as caught:
        run(make(train_steps=30, **settings))
    line = str(caught.value)
    assert line.startswith("step 11: 5 updates in a row were skipped, from step 7 on: the loss is nan; ")
    assert "in the gradients of 37 of 37 tensors: " in line
    assert "blocks.0.attention.query.weight from step 7 on, " in line
    assert "; the weights are those after step 6: " in line
    assert "--max-skipped-updates 50 goes past them" in line
    assert "\n" not in line
    assert saved(folder).steps() == [2, 4, 6]
    assert [row["step"] for row in rows_of(folder) if "loss" in row][-1] >= 11
    # The same command comes to the same place.
    bad.step = 6
    with pytest.raises(UserError, match="step 11: 5 updates in a row were skipped, from step 7 on"):
        run(make(train_steps=30, **settings))


def test_a_run_whose_last_updates_are_bad_is_saved_if_its_weights_prove_good(
    bad: BadSteps, make: Make, folder: Path
) -> None:
    bad.steps = {5, 6}
    run(make(train_steps=6))
    assert saved(folder).steps() == [6]
    assert int(saved(folder).load(6)["optimizer.step"]) == 4


@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_a_run_whose_last_update_is_nan_fails(
    what: str, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Optimizer.update

    def update(self: Optimizer, gradients: Any, skip: Tensor | None = None) -> Tensor:
        rate = plain(self, gradients, skip)
        if int(self.step) == 6:
            tensor = self.parameters[0] if what == "parameter" else self.state[f"second_moment.{self.names[0]}"]
            tensor.detach().fill_(math.nan)
        return rate

    monkeypatch.setattr(Optimizer, "update", update)
    expected = "step 6: the validation loss is nan" if what == "parameter" else "the state after step 6 is not saved"
    with pytest.raises(UserError, match=expected):
        run(make(train_steps=6, save_interval=2))
    assert saved(folder).steps() == [2, 4]
    assert not (folder / "summary.json").exists()


def test_a_spike_is_skipped_and_said(
    make: Make, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = update_guard.UpdateGuard.decide, [0]

    def decide(self: Any, loss: Tensor, norm: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        made[0] += 1
        return plain(self, loss, norm * 1000 if made[0] == 9 else norm, *rest)

    monkeypatch.setattr(update_guard.UpdateGuard, "decide", decide)
    run(make(train_steps=10, spike_sigma=50.0, spike_window=8))
    assert "step 9: the update is skipped: its loss 3." in capsys.readouterr().out
    assert [row["step"] for row in rows_of(folder) if "skipped" in row] == [9]
    assert int(saved(folder).load(10)["optimizer.step"]) == 9
