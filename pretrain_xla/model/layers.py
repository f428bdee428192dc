"""The two kinds of matrix: fp32 master weights, cast to the type of what they multiply.

Casting by hand instead of by autocast keeps the types in plain sight, and one traced graph the same on every backend.
A new matrix is filled with NaN, so that forgetting `initialize` (or a checkpoint's key) shows at the first loss instead
of as a run that learns badly. Both stay subclasses of `torch.nn`'s, which tensor-parallel wrappers look for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of x.

    sum_by_product: how the bias gets its gradient in bf16 on XLA: by `add_bias`. For an output whose gradient no matrix product
        makes, in whose course XLA would sum it for nothing.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, sum_by_product: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)
        self.sum_by_product = sum_by_product

    def reset_parameters(self) -> None:
        """Fill with NaN; `initialization.initialize` gives the first values."""
        _fill_with_nan(self)

    def forward(self, input: Tensor, rows: Tensor | None = None) -> Tensor:
        """Map (..., in_features) to (..., out_features), computed in `input`'s type.

        rows: factors (..., 1), fp32, of `input`'s rows, by which the products are multiplied instead.
        """
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        by_product = self.sum_by_product and input.dtype == torch.bfloat16 and input.device.type == "xla"
        if rows is None and not by_product:
            return F.linear(input, weight, bias)
        output = F.linear(input, weight)
        if rows is not None:
            output = (output * rows).to(input.dtype)
        if bias is not None:
            output = add_bias(output, bias) if by_product else output + bias
        return output


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x (…, F) + bias (F,), for bf16 on a TPU: the bias's gradient is a product with ones.

    The matrix unit adds in fp32, too, and reads the gradient once: 4 us by the TPU compiler for 8,192 x 768, where a sum is a
    pass of 109 us. Not in fp32, whose products a TPU rounds to bf16 first.
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
        # Eight rows alike: a product with one is a sum to XLA.
        ones_8N = torch.ones(8, len(grad_NF), dtype=grad_NF.dtype, device=grad_NF.device)
        return grads[0], (ones_8N @ grad_NF)[0]


class Embedding(nn.Embedding):
    """A table of fp32 rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Fill with NaN; `initialization.initialize` gives the first values."""
        _fill_with_nan(self)


def _fill_with_nan(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, float("nan"))
