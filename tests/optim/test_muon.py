"""Muon against `torch.optim.Muon`; its polynomials, its scale for rows, its weight decay; groups of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig, OptimConfig
from pretrain_xla.model import GPT
from pretrain_xla.optim import make_optimizer
from pretrain_xla.optim.matrices import own_share
from pretrain_xla.optim.muon import Muon
from pretrain_xla.optim.newton_schulz import QUINTIC, SAFETY, orthogonalize, polar_express
from pretrain_xla.optim.parameters import GROUPS, group_of, group_settings

SHAPES = {"blocks.0.wide.weight": (6, 20), "blocks.0.tall.weight": (20, 6), "blocks.1.wide.weight": (6, 20)}
RATE = torch.tensor(0.05)
STEP = torch.tensor(1, dtype=torch.int32)


def matrices(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


def make(named: dict[str, nn.Parameter], dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Muon:
    config = OptimConfig.model_validate({"optim_type": "muon", "muon_scale": "original"} | changes)
    return Muon(list(named.items()), config, group_settings("matrix", config, None), dtype=dtype)


@torch.no_grad()
def update(rule: Muon, given: list[Tensor], step: Tensor = STEP) -> dict[str, Tensor]:
    """How an update changed each parameter."""
    before = [parameter.detach().clone() for parameter in rule.parameters]
    rule.update([gradient.clone() for gradient in given], RATE, step)
    return {name: new - old for name, new, old in zip(rule.names, rule.parameters, before, strict=True)}


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_steps_as_pytorch_does(
    scale: str, weight_decay: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's knows only bf16, whose rounding hides small differences: the same steps are compared in fp32 as well.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype))
    named, reference = matrices(), matrices()
    rule = make(named, dtype, muon_polynomials="quintic", muon_scale=scale, weight_decay=weight_decay)
    theirs = torch.optim.Muon(
        list(reference.values()), lr=float(RATE), weight_decay=weight_decay, momentum=0.95, adjust_lr_fn=scale
    )
    for step in range(10):
        given = gradients(step)
        for parameter, gradient in zip(reference.values(), given, strict=True):
            parameter.grad = gradient.clone()
        changes = update(rule, given)
        theirs.step()
        for name, parameter in reference.items():
            tolerance = 1e-5 if dtype == torch.float32 else (step + 1) * 0.1 * float(changes[name].abs().max())
            torch.testing.assert_close(named[name], parameter, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
@pytest.mark.parametrize(("polynomials", "least"), [(polar_express(5), 0.8), ((QUINTIC,) * 5, 0.6)])
def test_singular_values_become_about_one(shape: tuple[int, int], polynomials: Any, least: float) -> None:
    given_NRC = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    found_NRC = orthogonalize(given_NRC, polynomials)
    assert found_NRC.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found_NRC.float())
    assert values.max() < 1.25
    # A square matrix may have singular values near 0, which five iterations do not bring to 1.
    assert values.quantile(0.2 if shape == (16, 16) else 0.0) > least
    u, _, v = torch.linalg.svd(given_NRC, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity((u @ v).flatten(1), found_NRC.float().flatten(1))
    assert (cosine > 0.97).all(), "of the same singular vectors"
    alone = torch.cat([orthogonalize(one[None], polynomials) for one in given_NRC])
    torch.testing.assert_close(alone, found_NRC, rtol=0, atol=0.02)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 8), polar_express(5)).any()


def test_the_polynomials_are_those_of_the_paper() -> None:
    # Amsel et al. 2025, section 4; from the third on the cushion's last digits show.
    paper = [
        (8.2872, -23.5959, 17.3004),
        (4.1071, -2.9478, 0.5448),
        (3.9487, -2.9089, 0.5518),
        (3.3184, -2.4885, 0.5100),
    ]
    for found, expected in zip(polar_express(4), paper, strict=True):
        scaled = [factor * SAFETY**power for factor, power in zip(found, (1, 3, 5), strict=True)]
        assert scaled == pytest.approx(expected, rel=2e-3)
    limit = [factor * SAFETY**power for factor, power in zip(polar_express(12)[-1], (1, 3, 5), strict=True)]
    assert limit == pytest.approx([15 / 8, -10 / 8, 3 / 8], rel=1e-2), "Newton-Schulz' own, once all values are near 1"


def test_layers_in_one_tensor_are_updated_as_apart() -> None:
    apart = {f"blocks.{i}.up.weight": nn.Parameter(torch.randn(6, 20)) for i in range(3)}
    together = {"blocks.all.up.weight": nn.Parameter(torch.stack(list(apart.values())).detach())}
    given = torch.randn(3, 6, 20)
    options = {"muon_row_beta": 0.9, "weight_decay": 0.1, "cautious_weight_decay": True}
    one_by_one = update(make(apart, **options), list(given))
    (at_once,) = update(make(together, **options), [given]).values()
    torch.testing.assert_close(torch.stack(list(one_by_one.values())), at_once)


def test_rows_that_moved_far_move_less() -> None:
    named = matrices()
    rule, plain = make(named, muon_row_beta=0.5), make(matrices())
    for seed in range(3):
        changes, unscaled = update(rule, gradients(seed)), update(plain, gradients(seed))
    for name, change in changes.items():
        assert float(change.norm()) == pytest.approx(float(unscaled[name].norm()), rel=1e-3), "the norm of all stays"
        ratios = change.norm(dim=1) / unscaled[name].norm(dim=1)
        moments = rule.state[f"row_moment.{name}"]
        torch.testing.assert_close(ratios / ratios[0], (moments[0] / moments).sqrt(), rtol=1e-3, atol=0)


def test_weight_decay_is_decoupled_and_can_be_cautious() -> None:
    given = gradients(0)
    plain, decayed = update(make(matrices()), given), update(make(matrices(), weight_decay=0.4), given)
    cautious = update(make(matrices(), weight_decay=0.4, cautious_weight_decay=True), given)
    for name, weight in matrices().items():
        expected = float(RATE) * 0.4 * weight.detach()
        torch.testing.assert_close(plain[name] - decayed[name], expected, rtol=0, atol=1e-6)
        towards_zero = plain[name] * weight < 0
        torch.testing.assert_close(plain[name] - cautious[name], expected * towards_zero, rtol=0, atol=1e-6)


def test_weight_decay_can_follow_the_learning_rate() -> None:
    zeros = [torch.zeros_like(gradient) for gradient in gradients(0)]
    follows = make(matrices(), weight_decay=0.4, learning_rate=0.1, weight_decay_schedule="learning_rate")
    for name, change in update(follows, zeros).items():
        torch.testing.assert_close(change, -0.05 * 0.4 * 0.5 * matrices()[name].detach())


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_adamws_weight_decay_can_follow_the_learning_rate(kind: str) -> None:
    """At half the peak rate, half the decay: the same update as with half the decay throughout."""
    half = OptimConfig.model_validate({"optim_type": kind, "learning_rate": 0.1, "weight_decay": 0.2})
    follows = half.model_copy(update={"weight_decay": 0.4, "weight_decay_schedule": "learning_rate"})
    results = []
    for config in (half, follows):
        named = matrices()
        optimizer = make_optimizer(named.items(), config, lambda step: RATE + 0 * step)
        optimizer.update(gradients(0))
        results.append(list(named.values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(results[0][0], matrices()[next(iter(SHAPES))])


def test_momentum_warms_up() -> None:
    rule = make(matrices(), muon_momentum_warmup=10)
    for step, momentum in ((1, 0.85), (6, 0.9), (11, 0.95), (50, 0.95)):
        before = [value.clone() for value in rule.momenta]
        given = gradients(step)
        update(rule, given, torch.tensor(step))
        for old, new, gradient in zip(before, rule.momenta, given, strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * gradient)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_of_all_processes_are_the_stack(processes: int) -> None:
    stack_NRC = torch.randn(6, 4, 5)
    shares = [own_share(stack_NRC, torch.tensor([index]), processes) for index in range(processes)]
    assert len({share.shape for share in shares}) == 1, "one program for all"
    together_NRC = torch.cat([orthogonalize(share, polar_express(5)) for share in shares])
    assert torch.equal(together_NRC[:6], orthogonalize(stack_NRC, polar_express(5)))
    assert not together_NRC[6:].any()


def test_groups_have_rates_betas_and_decays_of_their_own() -> None:
    """AdamW on four groups, and Muon's rest, step as PyTorch's AdamW does with the same groups."""
    own = {"embedding": (0.3, (0.8, 0.95), 0.02), "head": (0.1, (0.7, 0.9), 0.02), "scalar": (0.2, (0.9, 0.99), 0.0)}
    config = OptimConfig(
        learning_rate=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        embedding_weight_decay=0.02,
        **{f"{group}_learning_rate": rate for group, (rate, _, _) in own.items()},  # type: ignore[arg-type]
        **{f"{group}_betas": betas for group, (_, betas, _) in own.items()},  # type: ignore[arg-type]
    )
    model = GPT(ModelConfig(vocab_size=9, seq_length=4, d_model=8, num_layers=2, num_heads=2, d_ff=16))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    groups = {name: group_of(name) for name in shapes}
    assert set(groups.values()) == {"embedding", "head", "scalar", "matrix"} == set(GROUPS.values())
    for kind in ("adamw", "muon"):
        named = {name: nn.Parameter(torch.full(shape, 0.5)) for name, shape in shapes.items()}
        reference = {name: nn.Parameter(torch.full(shape, 0.5)) for name, shape in shapes.items()}
        optimizer = make_optimizer(
            named.items(), config.model_copy(update={"optim_type": kind}), lambda step: torch.tensor(0.05) / (step + 1)
        )
        settings = {name: own.get(group, (0.05, (0.9, 0.95), 0.1)) for name, group in groups.items()}
        theirs = torch.optim.AdamW(
            [
                {"params": [reference[n]], "betas": betas, "weight_decay": decay}
                for n, (_, betas, decay) in settings.items()
            ]
        )
        for step in range(3):
            by_name = {name: torch.randn(shape) for name, shape in shapes.items()}
            for group, (rate, _, _) in zip(theirs.param_groups, settings.values(), strict=True):
                group["lr"] = rate / (step + 1)
            for name, parameter in reference.items():
                parameter.grad = by_name[name]
            theirs.step()
            optimizer.update([by_name[name] for name in optimizer.names])
        for name in shapes:
            if kind == "muon" and groups[name] == "matrix":
                assert f"momentum.{name}" in optimizer.state
            else:
                torch.testing.assert_close(named[name], reference[name], rtol=0, atol=1e-5, msg=f"{kind} {name}")


@pytest.mark.parametrize(
    ("kind", "scale", "matrix"), [("adamw", "original", 4), ("muon", "original", 1), ("muon", "match_rms_adamw", 2)]
)
def test_rates_follow_the_width(kind: str, scale: str, matrix: float) -> None:
    """At four times `base_d_model` an update is that of rates divided as muP says; what decays a weight stays."""
    groups = {
        "embedding.weight": 1.0,
        "head.weight": 4.0,
        "blocks.0.attention.query.weight": matrix,
        "norm.weight": 1.0,
    }
    base = {"optim_type": kind, "muon_scale": scale, "learning_rate": 0.05, "weight_decay": 0.1, "base_d_model": 2}
    config = OptimConfig.model_validate(base)
    values = {name: torch.full((8, 8) if "norm" not in name else (8,), 0.5) for name in groups}
    given = {name: torch.randn_like(value) for name, value in values.items()}

    def changes(config: OptimConfig, d_model: int | None) -> dict[str, Tensor]:
        named = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        optimizer = make_optimizer(named.items(), config, lambda step: RATE + 0 * step, d_model=d_model)
        optimizer.update([given[name] for name in optimizer.names])
        return {name: parameter.detach() - values[name] for name, parameter in named.items()}

    whole, same, none = (
        changes(config, 8),
        changes(config, 2),
        changes(config.model_copy(update={"base_d_model": None}), 8),
    )
    decayed = {name: torch.zeros(()) if "norm" in name else -0.05 * 0.1 * values[name] for name in groups}
    for name, divisor in groups.items():
        torch.testing.assert_close(same[name], none[name], rtol=0, atol=0)
        torch.testing.assert_close(whole[name] - decayed[name], (none[name] - decayed[name]) / divisor)


def test_a_parameter_without_a_group_is_a_defect() -> None:
    with pytest.raises(KeyError, match="gadget"):
        make_optimizer([("gadget", torch.ones(2))], OptimConfig(), lambda step: step)
