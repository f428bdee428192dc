"""Learning-rate schedules compared with their formulas in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim import learning_rate

PEAK, FLOOR, WARMUP, END, COOLDOWN, WIDTH = 3e-3, 3e-4, 100, 1000, 200, 64
METHODS = ("cosine", "linear", "noam", "constant", "wsd")


def config(method: str, **changes: Any) -> OptimConfig:
    values: dict[str, Any] = {
        "decay_method": method,
        "learning_rate": PEAK,
        "min_lr": FLOOR,
        "warmup_steps": WARMUP,
        "decay_steps": END,
        "cooldown_steps": COOLDOWN,
    }
    return OptimConfig(**(values | changes))


def rate(step: int, settings: OptimConfig) -> float:
    value = learning_rate(torch.tensor(step, dtype=torch.int32), settings, WIDTH)
    assert value.dtype == torch.float32
    assert value.shape == ()
    return float(value)


# Rates by the number of the update, from 1: the update number n is made at step n - 1.
@pytest.mark.parametrize("method", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_its_first_update_counts(method: str) -> None:
    for update in (1, 2, 50, 99):
        assert rate(update - 1, config(method)) == pytest.approx(PEAK * update / WARMUP, rel=1e-6)
    assert rate(WARMUP - 1, config(method)) == pytest.approx(PEAK, rel=1e-6)


def test_lengths_and_floors_can_be_fractions() -> None:
    fractions = config(
        "wsd", cooldown_fraction=COOLDOWN / END, cooldown_steps=1, min_lr_fraction=FLOOR / PEAK, min_lr=0.0
    )
    for step in (0, 500, 799, 800, 900, 998, 999, 1200):
        assert rate(step, fractions) == pytest.approx(rate(step, config("wsd")), rel=1e-6)
    assert rate(499, config("wsd", cooldown_fraction=1.0, warmup_steps=0)) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate(END - 1, config("cosine", min_lr_fraction=0.0)) == pytest.approx(0.0, abs=1e-9)


def test_without_warm_up_the_first_update_is_at_the_top() -> None:
    assert rate(0, config("constant", warmup_steps=0)) == pytest.approx(PEAK, rel=1e-6)
    assert rate(0, config("wsd", warmup_steps=0)) == pytest.approx(PEAK, rel=1e-6)
    assert rate(0, config("cosine", warmup_steps=0)) == pytest.approx(PEAK, rel=1e-4)


@pytest.mark.parametrize("update", [100, 101, 325, 550, 775, 999, 1000])
def test_cosine(update: int) -> None:
    done = (update - WARMUP) / (END - WARMUP)
    expected = FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2
    assert rate(update - 1, config("cosine")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [100, 101, 325, 550, 775, 999, 1000])
def test_linear(update: int) -> None:
    expected = PEAK + (FLOOR - PEAK) * (update - WARMUP) / (END - WARMUP)
    assert rate(update - 1, config("linear")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [100, 500, 800, 801, 900, 999, 1000])
def test_wsd(update: int) -> None:
    start = END - COOLDOWN
    expected = PEAK if update <= start else PEAK + (FLOOR - PEAK) * (update - start) / COOLDOWN
    assert rate(update - 1, config("wsd")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [1, 2, 50, 100, 101, 550, 1000, 5000, 100_000])
def test_noam(update: int) -> None:
    expected = PEAK * WIDTH**-0.5 * min(update**-0.5, update * WARMUP**-1.5)
    assert rate(update - 1, config("noam")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [101, 1000, 1001, 100_000])
def test_constant(update: int) -> None:
    assert rate(update - 1, config("constant")) == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("method", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("floor", [FLOOR, 0.0, PEAK])
def test_from_the_end_on_it_stays_on_the_floor(method: str, floor: float) -> None:
    for update in (END, END + 1, 2 * END, 100 * END):
        assert rate(update - 1, config(method, min_lr=floor)) == pytest.approx(floor, rel=1e-5, abs=1e-12)


def test_a_fall_of_no_length_is_a_step() -> None:
    # Allowed by the config: warm-up up to the very step at which the floor is due.
    for method in ("cosine", "linear"):
        sharp = config(method, warmup_steps=END)
        assert rate(END - 1, sharp) == pytest.approx(PEAK, rel=1e-6)
        assert rate(END, sharp) == pytest.approx(FLOOR, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    peak=st.floats(1e-8, 10.0),
    share=st.floats(0.0, 1.0),
    warmup=st.integers(0, 2000),
    end=st.integers(1, 100_000),
    cooldown=st.integers(1, 100_000),
    step=st.integers(0, 200_000),
)
def test_it_stays_between_0_and_the_top_and_never_jumps(
    method: str, peak: float, share: float, warmup: int, end: int, cooldown: int, step: int
) -> None:
    falls = method in ("cosine", "linear", "wsd")
    assume(not falls or warmup <= (end - cooldown if method == "wsd" else end))
    assume(method != "noam" or warmup > 0)
    curve = config(
        method, learning_rate=peak, min_lr=peak * share, warmup_steps=warmup, decay_steps=end, cooldown_steps=cooldown
    )
    top = peak if method != "noam" else peak * WIDTH**-0.5 * warmup**-0.5
    here, there = rate(step, curve), rate(step + 1, curve)
    for value in (here, there):
        assert 0 <= value <= top * (1 + 1e-5)
    length = {"cosine": end - warmup, "linear": end - warmup, "wsd": cooldown}.get(method, math.inf)
    steepest = max(1 / max(warmup, 1), math.pi / 2 / max(length, 1))
    assert abs(there - here) <= top * (steepest * 1.01 + 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_step_may_stay_on_the_device(method: str) -> None:
    step = torch.empty((), dtype=torch.int32, device="meta")  # has no value that could be read
    assert learning_rate(step, config(method), WIDTH).is_meta
