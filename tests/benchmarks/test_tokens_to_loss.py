"""The comparison of recipes: its interpolation, and that each recipe is a config that differs where it says."""

from __future__ import annotations

import math

import pytest

from benchmarks.recipes import ABLATIONS, CONTESTANTS, SIZES, ablated, recipe
from benchmarks.tokens_to_loss import share_needed
from pretrain_xla.config import build_config
from pretrain_xla.model.flops import flops_per_token, parameter_count


def test_the_share_is_interpolated_over_the_logarithm_of_the_tokens() -> None:
    points = [(0.4, 4.0), (0.1, 5.0)]
    assert share_needed(4.5, points) == pytest.approx(0.2)
    assert share_needed(4.0, points) == pytest.approx(0.4)
    assert share_needed(5.5, points) == 0.1, "not below what was measured"
    assert share_needed(3.9, points) == math.inf


@pytest.mark.parametrize("size", SIZES)
def test_recipes_are_configs_of_one_size(size: str) -> None:
    configs = {name: build_config(recipe(name, SIZES[size], 100), name) for name in CONTESTANTS}
    flops = {name: flops_per_token(config.model) for name, config in configs.items()}
    assert max(flops.values()) < 1.05 * min(flops.values()), "a token costs every recipe the same"
    assert parameter_count(configs["baseline"].model) == pytest.approx(float(size[:-1]) * 1e6, rel=0.35)
    assert len({config.optim.optim_type for config in configs.values()}) == 2
    for ingredient in ABLATIONS:
        assert build_config(ablated(ingredient, SIZES[size], 100), ingredient) != configs["ours"], ingredient
