"""Norms by other means: the same values and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain_xla.model.layers import Linear
from pretrain_xla.model.norms import LayerNorm, RMSNorm


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_factors(zero_centered: bool, bias: bool) -> None:
    norm = RMSNorm(6, 1e-2, zero_centered, torch.float32)
    linears = [Linear(6, 5, bias), Linear(6, 3, bias)]
    for parameter in [*norm.parameters(), *(p for linear in linears for p in linear.parameters())]:
        parameter.data = noise(*parameter.shape).float()
    x_BTD = (3 * noise(2, 4, 6)).float().requires_grad_()
    whole = [linear(norm(x_BTD)) for linear in linears]
    values_BTD, rows_BT1 = norm.factors(x_BTD, x_BTD)
    late = [linear(values_BTD, rows_BT1) for linear in linears]
    leaves = [x_BTD, norm.weight, *(p for linear in linears for p in linear.parameters())]
    assert not rows_BT1.requires_grad
    for one, other in zip(late, whole, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [
        torch.autograd.grad(sum(torch.tanh(output).sum() for output in outputs), leaves) for outputs in (late, whole)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_factors_of_a_copy() -> None:
    norm = RMSNorm(6, 1e-2, False, torch.float32)
    norm.weight.data = noise(6).float()
    weight = noise(5, 6).float()

    def gradient(x: Tensor, copy: Tensor) -> Tensor:
        values, rows = norm.factors(x, copy)
        return torch.autograd.grad(torch.tanh(values @ weight.T * rows).sum(), copy)[0]

    x_BD = noise(4, 6).float()
    both, copy = x_BD.clone().requires_grad_(), x_BD.clone().requires_grad_()
    assert torch.equal(gradient(x_BD, copy), gradient(both, both))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_of_a_copy(bias: bool) -> None:
    norm = LayerNorm(6, 1e-2, bias, torch.float32)
    for parameter in norm.parameters():
        parameter.data = noise(*parameter.shape).float() + 1.0
    source, weights = 3 * noise(2, 4, 6).float() + 2.0, noise(6).float()
    results = []
    for x, *others in ((source.clone(), source.clone().requires_grad_()), (source.clone(),)):
        output = norm(x.requires_grad_(), *others)
        results.append([output, *torch.autograd.grad((torch.tanh(output) * weights).sum(), [x, *norm.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_factors_in_the_compute_type() -> None:
    norm = RMSNorm(64, 1e-5, False, torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    x = 1e4 * noise(3, 64).bfloat16()
    values, rows = norm.factors(x, x)
    assert values.dtype == torch.bfloat16
    assert rows.dtype == torch.float32
    torch.testing.assert_close((values * rows).square().mean(-1), torch.ones(3), rtol=1e-2, atol=0)
