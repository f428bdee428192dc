"""A linear layer whose bias gets its gradient by a matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_xla.model.layers import Linear


class ProductBiasLinear(Linear):
    """`Linear` for an output whose gradient no matrix product makes, as those of queries, keys and values.

    Where a product makes the gradient, XLA sums it for the bias in its course; here it would take a pass of its own. In bf16
    the bias is added by `add_bias` instead. Figures: docs/LOG.md.
    """

    def forward(self, input: Tensor, row_factors: Tensor | None = None) -> Tensor:
        """See `Linear`. row_factors (..., 1), fp32: factors of `input`'s rows, by which the products are multiplied instead."""
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        by_product = input.dtype == torch.bfloat16
        if row_factors is None and not by_product:
            return F.linear(input, weight, bias)
        output = F.linear(input, weight)
        if row_factors is not None:
            output = (output * row_factors).to(input.dtype)
        if bias is not None:
            output = add_bias(output, bias) if by_product else output + bias
        return output


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x (…, F) + bias (F,), for bf16 on a TPU: the bias's gradient is a product with ones.

    The matrix unit adds in fp32, too, and reads the gradient once. Not in fp32, whose products a TPU rounds to bf16 first.
    """
    found: Tensor = _AddBias.apply(x, bias)
    return found


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_NF = grads[0].flatten(0, -2)
        # Eight equal rows: a product with one is a sum to XLA.
        ones_8N = torch.ones(8, len(grad_NF), dtype=grad_NF.dtype, device=grad_NF.device)
        return grads[0], (ones_8N @ grad_NF)[0]
