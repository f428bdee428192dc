"""AdamW and gradient clipping compared with PyTorch's; skipped updates, names of the state, no host reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim import Optimizer, learning_rate, make_optimizer
from pretrain_xla.optim.clipping import clip_by_global_norm

SHAPES = {
    "blocks.0.feed_forward.up.bias": (7,),
    "embedding.weight": (11, 5),
    "blocks.0.feed_forward.up.weight": (7, 5),
    "final_norm.weight": (5,),
    "head.weight": (11, 5),
}
STEPS = 10
CONFIG = OptimConfig(weight_decay=0.1, betas=(0.9, 0.95))


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """A mix of matrices and others, matrices not first."""
    generator = torch.Generator().manual_seed(seed)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def gradients(seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Gradients of `STEPS` steps, of sizes from small to large."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        scale = 10.0 ** (step % 4 - 2)
        yield {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def rate_of(step: Tensor) -> Tensor:
    """A rate that differs at each step."""
    return 0.01 / (step.to(torch.float32) + 1.0)


def make(named: list[tuple[str, nn.Parameter]], **changes: Any) -> Optimizer:
    return make_optimizer(named, CONFIG.model_copy(update=changes), rate_of)


def in_order(optimizer: Optimizer, by_name: dict[str, Tensor]) -> list[Tensor]:
    return [by_name[name] for name in optimizer.names]


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_it_steps_as_pytorch_does(kind: str, weight_decay: float, betas: tuple[float, float]) -> None:
    named, reference = parameters(), dict(parameters())
    optimizer = make(named, optim_type=kind, weight_decay=weight_decay, betas=betas)
    matrices = [p for p in reference.values() if p.dim() >= 2]
    others = [p for p in reference.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    theirs: type[torch.optim.Optimizer] = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    torchs = theirs(groups, betas=betas, eps=1e-8)  # type: ignore[call-arg]
    for step, by_name in enumerate(gradients()):
        for group in torchs.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for name, parameter in reference.items():
            parameter.grad = by_name[name].clone()
        torchs.step()
        rate = optimizer.update(in_order(optimizer, by_name))
        assert float(rate) == pytest.approx(0.01 / (step + 1), rel=1e-6)
        for name, parameter in named:
            torch.testing.assert_close(parameter, reference[name], rtol=0, atol=1e-6, msg=f"{name} at step {step}")
    assert int(optimizer.step) == STEPS


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_decay_is_for_matrices_only(kind: str) -> None:
    named, before = parameters(), dict(parameters())
    optimizer = make(named, optim_type=kind, weight_decay=0.5)
    optimizer.update([torch.zeros_like(p) for p in optimizer.parameters])
    for name, parameter in named:
        if parameter.dim() >= 2:
            assert ((before[name] - parameter) * before[name].sign() > 0).all(), f"{name} does not move towards 0"
        else:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_update_leaves_everything_as_it_was(kind: str) -> None:
    named = parameters()
    optimizer = make(named, optim_type=kind, muon_row_beta=0.9)
    optimizer.update(in_order(optimizer, next(gradients())))
    before = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    weights = {name: parameter.detach().clone() for name, parameter in named}
    broken = [torch.full_like(p, float("nan")) for p in optimizer.parameters]
    optimizer.update(broken, skip=torch.tensor(True))
    assert int(optimizer.step) == 1
    for name, tensor in optimizer.state.items():
        assert torch.equal(tensor, before[name]), name
    for name, parameter in named:
        assert torch.equal(parameter, weights[name]), name


def test_an_update_that_might_have_been_skipped_is_the_same_update() -> None:
    plain, masked = make(parameters()), make(parameters())
    for by_name in gradients():
        plain.update(in_order(plain, by_name))
        masked.update(in_order(masked, by_name), skip=torch.tensor(False))
    for one, other in zip(plain.parameters, masked.parameters, strict=True):
        assert torch.equal(one, other)
    for name, tensor in plain.state.items():
        assert torch.equal(tensor, masked.state[name]), name


def test_state_is_addressed_by_name_and_placed_by_the_caller() -> None:
    asked: dict[str, tuple[int, ...]] = {}

    def place(name: str, shape: torch.Size, _parameter: Tensor) -> Tensor:
        asked[name] = tuple(shape)
        return torch.tensor(5, dtype=torch.int32) if name == "step" else torch.full(shape, 0.25)

    optimizer = make_optimizer(parameters(), OptimConfig(), rate_of, place)
    moments = {f"{moment}_moment.{name}": SHAPES[name] for moment in ("first", "second") for name in SHAPES}
    assert set(optimizer.state) == {"step", *moments} == set(asked)
    assert {name: asked[name] for name in moments} == moments
    assert float(optimizer.update(in_order(optimizer, next(gradients())))) == pytest.approx(0.01 / 6)
    assert int(optimizer.state["step"]) == 6, "the state is live, not a copy"
    fresh = make(parameters()).state
    assert fresh["step"].dtype == torch.int32
    assert all(not tensor.any() for tensor in fresh.values())


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    named = parameters()
    whole = make(named)
    steps = list(gradients())
    for by_name in steps[:4]:
        whole.update(in_order(whole, by_name))
    saved = {name: tensor.clone() for name, tensor in whole.state.items()}
    copies = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in reversed(named)]
    resumed = make_optimizer(copies, CONFIG, rate_of, lambda name, _shape, _parameter: saved[name].clone())
    for by_name in steps[4:]:
        whole.update(in_order(whole, by_name))
        resumed.update(in_order(resumed, by_name))
    for name, parameter in named:
        assert torch.equal(parameter, dict(copies)[name]), name


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
def test_clipping_is_pytorchs(max_norm: float) -> None:
    named = parameters()
    by_name = list(gradients())[3]
    for name, parameter in named:
        parameter.grad = by_name[name].clone()
    expected_norm = nn.utils.clip_grad_norm_([p for _, p in named], max_norm)
    clipped, norm = clip_by_global_norm([by_name[name] for name, _ in named], max_norm)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    assert norm.shape == ()
    for (_, parameter), gradient in zip(named, clipped, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
    joint = float(torch.cat([gradient.flatten() for gradient in clipped]).norm())
    assert joint == pytest.approx(min(max_norm, float(expected_norm)), rel=1e-4)


def test_clipping_at_0_only_measures() -> None:
    given = list(list(gradients())[3].values())
    clipped, norm = clip_by_global_norm(given, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(given, clipped, strict=True))
    assert float(norm) == pytest.approx(float(torch.cat([gradient.flatten() for gradient in given]).norm()), rel=1e-6)


def test_the_norm_of_half_precision_is_taken_in_fp32() -> None:
    _, norm = clip_by_global_norm([torch.full((100,), 100.0, dtype=torch.float16)] * 4, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(2000.0)  # its square, 4e6, is no fp16 number


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_nothing_reads_a_value(kind: str) -> None:
    # Meta tensors have no values: a host read or a branch on one would raise, and on a TPU would stop the device.
    named = [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in SHAPES.items()]
    config = OptimConfig.model_validate(
        {"optim_type": kind, "weight_decay": 0.1, "muon_row_beta": 0.9, "muon_momentum_warmup": 3}
    )
    optimizer = make_optimizer(named, config, lambda step: learning_rate(step, config, 64))
    given, norm = clip_by_global_norm([torch.empty_like(p) for p in optimizer.parameters], 1.0)
    skip = torch.empty((), dtype=torch.bool, device="meta")
    for rate in (optimizer.update(given), optimizer.update(given, skip=skip)):
        assert rate.is_meta
        assert rate.shape == ()
    assert norm.is_meta
