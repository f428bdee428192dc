"""The parts of a block besides attention: matrices, normalisations, rotary positions and the feed-forward layer.

Weights are fp32 and are cast to the type of what they multiply, by hand instead of by autocast: the types are in plain sight.
A new weight is NaN, so that a forgotten `initialize` or a missing key of a checkpoint shows at the first loss.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, E/2) in fp32, or (B, 1, T, E/2) where positions differ by row."""


def _fill_with_nan(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, float("nan"))


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of x."""

    reset_parameters = _fill_with_nan

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Embedding(nn.Embedding):
    """A table of fp32 rows."""

    reset_parameters = _fill_with_nan


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, multiply by a weight, add a bias (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps, self.compute_dtype = eps, compute_dtype
        _fill_with_nan(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, in fp32; the result is in the compute type."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(self.compute_dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a weight, or by 1 + weight (Zhang & Sennrich 2019; Gemma)."""

    def __init__(self, width: int, eps: float, zero_centered: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.zero_centered, self.compute_dtype = eps, zero_centered, compute_dtype
        _fill_with_nan(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, in fp32; the result is in the compute type."""
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.scale()).to(self.compute_dtype)

    def scale(self) -> Tensor:
        """The factor on a normalised value."""
        return 1.0 + self.weight if self.zero_centered else self.weight


def make_norm(config: ModelConfig, compute_dtype: torch.dtype) -> nn.Module:
    """The configured normalisation over the residual stream's width."""
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, config.norm_eps, config.bias, compute_dtype)
    return RMSNorm(config.d_model, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)


def rotary_tables(length: int, head_dim: int, base: float) -> RotaryTables:
    """Cosine and sine of each position's angles, position * base ** (-2i / E) for pair i (Su et al. 2021); fp32, on the CPU."""
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate each head by its token's position: channel i with channel i + E/2, as in Llama, Qwen and Gemma."""
    cos, sin = tables
    first, second = x_BHTE.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTE.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, config.bias)
        self.gate = Linear(config.d_model, config.d_ff, config.bias) if config.gated else None
        self.down = Linear(config.d_ff, config.d_model, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        up_BTF = self.up(x_BTD)
        hidden_BTF = self.activation(up_BTF) if self.gate is None else self.activation(self.gate(x_BTD)) * up_BTF
        return cast(Tensor, self.down(hidden_BTF))
