"""The mean of the weights: against a plain mean, over skipped updates, and exchanged with the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim import Optimizer, make_optimizer

SHAPES = {"embedding.weight": (5, 4), "blocks.0.attention.query.weight": (4, 4), "final_norm.weight": (4,)}
STEPS, START = 10, 6


def make(**changes: object) -> Optimizer:
    generator = torch.Generator().manual_seed(1)
    named = [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]
    config = OptimConfig.model_validate({"decay_steps": STEPS, "warmup_steps": 0, "average_fraction": 0.4} | changes)
    return make_optimizer(named, config, lambda step: 0.1 + 0.0 * step)


def train(optimizer: Optimizer, skipped: frozenset[int] = frozenset()) -> list[list[torch.Tensor]]:
    """All updates with random gradients; the parameters after each that was made."""
    generator = torch.Generator().manual_seed(2)
    after = []
    for number in range(1, STEPS + len(skipped) + 1):
        gradients = [torch.randn(p.shape, generator=generator) for p in optimizer.parameters]
        if number in skipped:
            gradients = [torch.full_like(gradient, torch.nan) for gradient in gradients]
        optimizer.update(gradients, skip=torch.tensor(number in skipped))
        if number not in skipped:
            after.append([parameter.detach().clone() for parameter in optimizer.parameters])
    return after


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("skipped", [frozenset(), frozenset({1, 4, 8, 9})])
def test_it_is_the_mean_of_the_last_weights(kind: str, skipped: frozenset[int]) -> None:
    optimizer = make(optim_type=kind)
    after = train(optimizer, skipped)
    assert optimizer.average is not None
    for index, mean in enumerate(optimizer.average.means):
        wanted = torch.stack([weights[index] for weights in after[START:]]).mean(0)
        torch.testing.assert_close(mean, wanted)


def test_until_then_it_is_the_weights_bit_for_bit() -> None:
    optimizer = make(decay_steps=1000)
    train(optimizer, frozenset({1, 5}))
    assert optimizer.average is not None
    assert all(torch.equal(p, mean) for p, mean in zip(optimizer.parameters, optimizer.average.means, strict=True))


def test_it_is_exchanged_with_the_weights_and_back() -> None:
    optimizer = make()
    train(optimizer)
    average = optimizer.average
    assert average is not None
    before = [p.detach().clone() for p in optimizer.parameters], [mean.clone() for mean in average.means]
    average.exchange()
    assert all(torch.equal(p, mean) for p, mean in zip(optimizer.parameters, before[1], strict=True))
    average.exchange()
    for now, then in zip((optimizer.parameters, average.means), before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(now, then, strict=True))


def test_training_is_the_same_with_it() -> None:
    averaged, plain = make(), make(average_fraction=0.0)
    for one, other in zip(train(averaged), train(plain), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert plain.average is None
    assert not any(name.startswith("average.") for name in plain.state)
