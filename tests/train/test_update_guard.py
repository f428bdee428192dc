"""Which updates are skipped, and that a skipped one changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain_xla.config import RunConfig, TrainConfig
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.train.step import METRICS, TrainStep
from pretrain_xla.train.update_guard import UpdateGuard
from tests.faulty_loss import bad_gradient, bad_loss

from .test_step import HISTORY, OPTIM, batches, make_step, scaled, split_batch

Make = Callable[..., RunConfig]
NAN, INF = math.nan, math.inf


def make_guard(**settings: float | int) -> UpdateGuard:
    return UpdateGuard(["a", "b"], TrainConfig.model_validate(settings), lambda _name, new: new)


def decide(guard: UpdateGuard, loss: float, norm: float, scale: float | None = None) -> tuple[bool, int]:
    squares = torch.tensor([1.0, 1.0 if math.isfinite(norm) else norm])
    found = None if scale is None else torch.tensor(scale)
    skip, row = guard.decide(torch.tensor(loss), torch.tensor(norm), squares, found)
    return bool(skip), int(row)


def test_what_is_not_finite_is_skipped_and_counted() -> None:
    guard = make_guard()
    given = [(3.0, 1.0), (NAN, 1.0), (3.0, NAN), (3.0, INF), (-INF, INF), (3e38, 3e38), (3.0, INF)]
    found = [decide(guard, loss, norm) for loss, norm in given]
    assert found == [(False, 0), (True, 1), (True, 2), (True, 3), (True, 4), (False, 0), (True, 1)]
    assert guard.diagnosis["bad_gradients"].tolist() == [0, 1]


def test_overflows_that_find_the_loss_scale_do_not_count() -> None:
    guard = make_guard()
    assert decide(guard, NAN, NAN, 8.0) == (True, 1), "of a loss that is not finite no scale is to blame"
    assert decide(guard, 3.0, INF, 8.0) == (True, 1)
    assert decide(guard, 3.0, INF, 1.0) == (True, 2), "there is nothing left to find"
    assert decide(guard, 3.0, 1.0, 1.0) == (False, 0)


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_spike_is_what_the_rule_says(which: str) -> None:
    window, sigma = 16, 4.0
    guard = make_guard(spike_sigma=sigma, spike_window=window)
    rng = np.random.default_rng(0)
    values = rng.normal(5.0, 0.1, 60)
    values[[5, 30, 31, 45]] = [90.0, 1e30, 5.6, 4.0]  # too early; a spike; one behind it; far below
    recent: list[float] = []
    skipped = []
    for step, value in enumerate(values):
        loss, norm = (value, 1.0) if which == "loss" else (2.0, value)
        skip, _ = decide(guard, loss, norm)
        if len(recent) >= window // 2:
            past = np.array(recent[-window:])
            limit = past.mean() + sigma * past.std(ddof=1)
            assert skip == (value > limit), step
            recent.append(min(value, limit))
        else:
            assert not skip, step
            recent.append(value)
        skipped += [step] * skip
    assert 30 in skipped
    assert 31 in skipped, "the spike before it does not hide it"
    assert not {5, 45} & set(skipped)
    np.testing.assert_allclose(guard.state["recent"][int(which == "norm")], recent[-window:], rtol=1e-4)


def test_nan_does_not_enter_the_window_and_a_lasting_change_is_accepted() -> None:
    guard = make_guard(spike_sigma=6.0, spike_window=32)
    rng = np.random.default_rng(1)
    for value in rng.normal(5.0, 0.1, 40):
        decide(guard, float(value), 1.0)
    before = guard.state["recent"].clone()
    assert decide(guard, NAN, 1.0) == (True, 1)
    assert decide(guard, 5.0, INF) == (True, 2)
    assert torch.equal(guard.state["recent"], before)
    found = [decide(guard, float(value), 1.0)[0] for value in rng.normal(7.0, 0.1, 40)]
    assert found[0]
    assert sum(found) < 10
    assert not any(found[10:])


KINDS = {
    "adamw": {"optim_type": "adamw"},
    "adam": {"optim_type": "adam"},
    "muon": {"optim_type": "muon", "muon_row_beta": 0.9, "muon_momentum_warmup": 3},
    "fp16": {"optim_type": "adamw"},
}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def steps(kind: str, make_config: Make, runtime: TorchRuntime) -> tuple[TrainStep, Callable[[int], list[float]]]:
    """A step whose batch 1 is bad if it has a faulty loss, and a function that runs it on a batch; returns the metrics."""
    config = make_config(optim=OPTIM | KINDS[kind], train={"gradient_accum_step": 2, "spike_sigma": 6.0})
    step = make_step(scaled(config) if kind == "fp16" else config, runtime)
    given = batches(config)
    given[1][3, 0] = 36  # in one micro-batch of two
    for good in (0, 2):
        given[good][given[good] == 36] = 0
    return step, lambda index: step(split_batch(given[index], 2), torch.zeros(HISTORY, len(METRICS)))[-1].tolist()


@pytest.mark.parametrize("fault", [bad_loss, bad_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_leaves_no_trace(
    kind: str,
    fault: Callable[..., None],
    make_config: Make,
    runtime: TorchRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch, token=36)
    step, run = steps(kind, make_config, runtime)
    run(0)
    before = {name: bits(tensor) for name, tensor in step.named_state().items()}
    loss, norm, rate, skipped, in_a_row = run(1)
    assert math.isfinite(loss) == (fault is bad_gradient)
    assert not math.isfinite(norm)
    # An overflow of a finite loss halves fp16's scale, which is found like this, and is no sign of bad data.
    finds_scale = kind == "fp16" and fault is bad_gradient
    assert (skipped, in_a_row) == (1, 0 if finds_scale else 1)
    changed = {name for name, tensor in step.named_state().items() if bits(tensor) != before[name]}
    assert changed == ({"loss_scale.scale", "loss_scale.good_steps"} if finds_scale else {"guard.skipped_in_a_row"})
    bad = step.guard.diagnosis["bad_gradients"]
    assert bool(bad.all()) == (fault is bad_loss)
    assert bad[step.guard.names.index("head.weight")] == 1

    after = run(2)
    never, run_never = steps(kind, make_config, runtime)
    run_never(0)
    if finds_scale:
        never.loss_scale.scale.mul_(0.5)
        never.loss_scale.good_steps.zero_()
    assert run_never(2) == after, "as if the bad batch had not been there"
    assert after[2] == rate, "the schedule goes on where it was"
    for name, tensor in step.named_state().items():
        assert bits(tensor) == bits(never.named_state()[name]), name
