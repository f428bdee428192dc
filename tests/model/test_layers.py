"""The two ways to a bias's gradient."""

from __future__ import annotations

import torch

from pretrain_xla.model.layers import add_bias


def test_add_bias() -> None:
    x_BTF, bias_F, grad_BTF = (torch.randn(*shape).bfloat16() for shape in ((2, 50, 6), (6,), (2, 50, 6)))
    leaves = [x_BTF.requires_grad_(), bias_F.requires_grad_()]
    output = add_bias(x_BTF, bias_F)
    assert torch.equal(output, x_BTF + bias_F)
    grad_x, grad_bias = torch.autograd.grad(output, leaves, grad_BTF)
    assert torch.equal(grad_x, grad_BTF)
    torch.testing.assert_close(grad_bias, grad_BTF.float().sum((0, 1)).bfloat16())
