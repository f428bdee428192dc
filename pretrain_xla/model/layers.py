"""The two kinds of matrix: fp32 master weights, cast to the type of what they multiply.

Casting by hand instead of by autocast keeps the types in plain sight, and one traced graph the same on every backend.
A new matrix is filled with NaN, so that forgetting `initialize` (or a checkpoint's key) shows at the first loss instead
of as a run that learns badly. Both stay subclasses of `torch.nn`'s, which tensor-parallel wrappers look for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of x."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Fill with NaN; `initialization.initialize` gives the first values."""
        _fill_with_nan(self)

    def forward(self, input: Tensor, rows: Tensor | None = None) -> Tensor:
        """Map (..., in_features) to (..., out_features), computed in `input`'s type.

        rows: factors (..., 1), fp32, of `input`'s rows, by which the products are multiplied instead.
        """
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if rows is None:
            return F.linear(input, weight, bias)
        output = (F.linear(input, weight) * rows).to(input.dtype)
        return output if bias is None else output + bias


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
