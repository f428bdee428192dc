"""The comparison of widths: its parabola, and that the rule alone differs between the configs."""

from __future__ import annotations

import math

import pytest

from benchmarks.width_transfer import RATES, WIDTHS, best_factor, config
from pretrain_xla.config import build_config


def test_the_best_factor_is_the_lowest_point_of_a_parabola() -> None:
    points = [(factor, (math.log(factor) - math.log(1.3)) ** 2 + 4.0) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert best_factor(points) == pytest.approx(1.3)
    assert math.isnan(best_factor([(1.0, 4.0), (2.0, 5.0)]))


@pytest.mark.parametrize("optim_type", ["muon", "adamw"])
def test_configs_differ_in_width_and_factor_alone(optim_type: str) -> None:
    configs = [build_config(config(optim_type, width, 1.0, True), "") for width in WIDTHS]
    assert configs[0].optim == configs[1].optim
    assert [c.model.d_model for c in configs] == list(WIDTHS)
    assert len({c.model.heads_dim for c in configs}) == 1
    doubled = build_config(config(optim_type, WIDTHS[0], 2.0, True), "").optim
    assert all(getattr(doubled, rate) == 2 * getattr(configs[0].optim, rate) for rate in RATES)
    assert build_config(config(optim_type, WIDTHS[0], 1.0, False), "").optim.base_d_model is None
