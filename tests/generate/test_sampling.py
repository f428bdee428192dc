"""Sampling: which tokens can be drawn, how often, and which settings are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.generate.sampling import Sampling, choose, draws

PROBABILITIES = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
LOGITS = PROBABILITIES.log() + 3.0
DRAWS = 2000


def draw(logits_V: Tensor, sampling: Sampling, times: int = DRAWS, seed: int = 0) -> list[int]:
    """The same choice again and again, with fresh chance."""
    chance_B = draws(seed, 1, times)[:, 0]
    return choose(logits_V.expand(times, -1), sampling.rules, sampling.numbers(), chance_B).tolist()


def assert_distributed(found: list[int], expected: Tensor) -> None:
    """Chi-square below its 99.99% point for 4 degrees of freedom (fewer only make it lower)."""
    counts = Counter(found)
    assert set(counts) <= set(torch.nonzero(expected).flatten().tolist())
    wanted = {token: float(p) * len(found) for token, p in enumerate(expected / expected.sum()) if p > 0}
    assert sum((counts[token] - count) ** 2 / count for token, count in wanted.items()) < 23.5


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), PROBABILITIES**2),
        (Sampling(temperature=2.0), PROBABILITIES**0.5),
        (Sampling(top_k=2), torch.tensor([0, 0.4, 0.25, 0, 0])),
        (Sampling(top_k=5), PROBABILITIES),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.6), torch.tensor([0, 0.4, 0.25, 0, 0])),  # 0.4 does not reach 0.6; with 0.25 it does
        (Sampling(top_p=0.7), torch.tensor([0, 0.4, 0.25, 0.2, 0])),
        (Sampling(top_p=0.9), torch.tensor([0, 0.4, 0.25, 0.2, 0.1])),
        (Sampling(top_k=3, top_p=0.7), torch.tensor([0, 0.4, 0.25, 0, 0])),  # of what top-k leaves
        (Sampling(top_p=1e-9), torch.tensor([0, 1.0, 0, 0, 0])),
        (Sampling(min_p=0.4), torch.tensor([0, 0.4, 0.25, 0.2, 0])),  # at least 0.16
        (Sampling(min_p=0.6, top_p=0.95), torch.tensor([0, 0.4, 0.25, 0, 0])),
        (Sampling(min_p=1.0), torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=str,
)
def test_what_comes_and_how_often(sampling: Sampling, expected: Tensor) -> None:
    found = draw(LOGITS, sampling)
    assert set(found) == set(torch.nonzero(expected).flatten().tolist())
    assert_distributed(found, expected)


def test_temperature_comes_before_top_p() -> None:
    # At temperature 2 the probabilities are flatter, and more tokens are needed to reach 0.6.
    assert set(draw(LOGITS, Sampling(temperature=2.0, top_p=0.6))) == {1, 2, 3}


def test_greedy_needs_no_chance() -> None:
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.5)):
        assert not sampling.rules.draws
        assert set(draw(LOGITS, sampling, 50)) == {1}


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_rule_a_token_comes_and_a_likely_one(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits_V = torch.tensor(logits)
    token = draw(logits_V, Sampling(temperature, top_k, top_p), times=1, seed=seed)[0]
    likelier = logits_V > logits_V[token]
    assert top_k == 0 or int(likelier.sum()) < top_k
    probabilities_V = torch.softmax(logits_V / temperature, -1)
    assert top_p == 1 or float(probabilities_V[likelier].sum()) < top_p + 1e-4 or top_k


def test_the_k_likeliest_are_k_when_some_are_equal() -> None:
    # Equal scores are common: a bf16 head has eight bits to tell them apart.
    equal = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert len(set(draw(equal, Sampling(top_k=1), times=200))) == 1
    assert len(set(draw(equal, Sampling(top_k=2), times=200))) == 2


def test_a_seed_repeats_and_another_does_not() -> None:
    sampling = Sampling(temperature=1.3, top_k=4)
    assert draw(LOGITS, sampling, 50, seed=7) == draw(LOGITS, sampling, 50, seed=7)
    assert draw(LOGITS, sampling, 50, seed=7) != draw(LOGITS, sampling, 50, seed=8)


def test_the_scores_are_left_as_they_were() -> None:
    logits_V = LOGITS.clone()
    draw(logits_V, Sampling(temperature=0.5, top_k=2, top_p=0.5), times=3)
    assert torch.equal(logits_V, LOGITS)


def test_no_temperature_is_below_what_devices_tell_from_nothing() -> None:
    temperatures = [float(Sampling(temperature=value).numbers()[0]) for value in (0.0, 1e-40, 0.5)]
    assert temperatures == pytest.approx([0.0, 1e-30, 0.5])


def test_a_very_low_temperature_is_greedy() -> None:
    assert set(draw(LOGITS, Sampling(temperature=1e-4), times=50)) == {1}
    assert set(draw(LOGITS, Sampling(temperature=1e-40), times=50)) == {1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": -0.1}, "--temperature -0.1 is negative: use 0 (greedy) or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1 is negative: use 0 for no limit"),
        ({"top_p": 0.0}, "--top-p 0.0 is outside (0, 1]: use 1 for no limit"),
        ({"top_p": 1.5}, "--top-p 1.5 is outside (0, 1]"),
        ({"top_p": -0.5}, "--top-p -0.5 is outside (0, 1]"),
        ({"top_p": float("nan")}, "--top-p nan is outside (0, 1]"),
        ({"min_p": 1.1}, "--min-p 1.1 is outside [0, 1]: use 0 for no limit"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0 is not above 0: use 1 for no penalty"),
        ({"repetition_penalty": float("inf")}, "--repetition-penalty inf"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**values)
    assert str(caught.value).startswith(expected)


def theirs(logits_BV: Tensor, text_BT: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities by `transformers`' own processors, in the order in which its `generate` applies them."""
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
        transformers.TopKLogitsWarper(sampling.top_k or logits_BV.shape[1]),
        transformers.TopPLogitsWarper(sampling.top_p),
        transformers.MinPLogitsWarper(sampling.min_p),
    ]
    for step in steps:
        logits_BV = step(text_BT, logits_BV)
    return torch.softmax(logits_BV, -1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 0.99),
    min_p=st.floats(0.0, 0.5),
    penalty=st.floats(0.5, 2),
)
def test_the_token_is_where_the_sum_of_transformers_probabilities_reaches_the_chance(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    noise = torch.Generator().manual_seed(seed)
    logits_BV = 2 * torch.randn(8, 10, generator=noise)
    text_BT = torch.randint(0, 10, (8, 4), generator=noise)
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    seen_BV = torch.zeros(8, 10, dtype=torch.bool).scatter(1, text_BT, torch.tensor(True).expand(8, 4))
    chance_B = draws(seed, 8, 1)[0]
    found_B = choose(logits_BV, sampling.rules, sampling.numbers(), chance_B, seen_BV)
    probabilities_BV, order_BV = theirs(logits_BV, text_BT, sampling).sort(dim=-1, descending=True, stable=True)
    for row in range(8):
        place = int((order_BV[row] == found_B[row]).nonzero())
        reached = float(probabilities_BV[row, : place + 1].sum())
        assert float(probabilities_BV[row, place]) > 0
        assert reached - float(probabilities_BV[row, place]) - 1e-5 <= float(chance_B[row]) <= reached + 1e-5


def test_a_rows_chance_does_not_depend_on_other_rows() -> None:
    assert torch.equal(draws(3, 1, 9)[:, 0], draws(3, 4, 9)[:, 0])
    assert torch.equal(draws(3, 2, 5), draws(3, 2, 9)[:5])
    assert not torch.equal(draws(3, 2, 9)[:, 0], draws(3, 2, 9)[:, 1])
    assert 0 < float(draws(3, 1, 10000).min()) <= float(draws(3, 1, 10000).max()) <= 1


def test_chance_at_its_ends() -> None:
    weights_V = torch.tensor([0.0, 0.5, 0.5, 0.0]).log()
    for sampling in (Sampling(), Sampling(top_p=0.999)):
        chance_B = torch.tensor([2.0**-24, 1.0])
        assert choose(weights_V.expand(2, -1), sampling.rules, sampling.numbers(), chance_B).tolist() == [1, 2]
