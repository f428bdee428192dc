"""Dynamic loss scaling: an overflow halves the scale, and nothing is read on the host."""

from __future__ import annotations

import pytest
import torch

from pretrain_xla.train import loss_scale as module
from pretrain_xla.train.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_gradients_are_divided_by_the_scale() -> None:
    scale = LossScale(CPU)
    given = [torch.full((3,), INITIAL_SCALE), torch.tensor([[-2.0 * INITIAL_SCALE]])]
    clean = scale.unscale(given)
    assert torch.equal(clean[0], torch.ones(3))
    assert torch.equal(clean[1], torch.tensor([[-2.0]]))


def test_an_overflow_halves_the_scale() -> None:
    scale = LossScale(CPU)
    scale.adjust(NO, NO)
    scale.adjust(YES, YES)
    assert float(scale.scale) == INITIAL_SCALE / 2
    assert int(scale.good_steps) == 0
    scale.adjust(YES, YES)
    assert float(scale.scale) == INITIAL_SCALE / 4


def test_it_grows_after_an_interval_without_overflow_and_not_before() -> None:
    scale = LossScale(CPU)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.adjust(NO, NO)
    assert float(scale.scale) == INITIAL_SCALE
    assert int(scale.good_steps) == GROWTH_INTERVAL - 1
    scale.adjust(NO, NO)
    assert float(scale.scale) == 2 * INITIAL_SCALE
    assert int(scale.good_steps) == 0


def test_an_overflow_restarts_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROWTH_INTERVAL", 3)
    scale = LossScale(CPU)
    found = []
    for overflow in (NO, NO, YES, NO, NO, NO, NO):
        scale.adjust(overflow, overflow)
        found.append(float(scale.scale) / INITIAL_SCALE)
    assert found == [1, 1, 0.5, 0.5, 0.5, 1, 1]


def test_an_update_that_is_skipped_for_another_reason_changes_nothing() -> None:
    scale = LossScale(CPU)
    scale.adjust(NO, NO)
    scale.adjust(YES, NO)
    assert float(scale.scale) == INITIAL_SCALE
    assert int(scale.good_steps) == 1


def test_state_is_not_a_copy() -> None:
    scale = LossScale(CPU)
    state = scale.state
    scale.adjust(YES, YES)
    assert float(state["scale"]) == INITIAL_SCALE / 2
    state["scale"].fill_(8.0)
    assert float(scale.unscale([torch.tensor([16.0])])[0]) == 2.0


def test_nothing_reads_a_value() -> None:
    scale = LossScale(torch.device("meta"))  # a tensor there has no value to read
    clean = scale.unscale([torch.empty(3, device="meta")])
    overflow = torch.empty((), dtype=torch.bool, device="meta")
    scale.adjust(overflow, overflow)
    assert clean[0].is_meta
