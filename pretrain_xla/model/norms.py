"""Normalisations: computed in fp32 whatever comes in, emitted in the model's compute type."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, multiply by a weight, add a bias (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan"), dtype=torch.float32))
        self.bias = nn.Parameter(torch.full((width,), float("nan"), dtype=torch.float32)) if bias else None
        self.eps = eps
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        normed = F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.to(self.compute_dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a weight, or by 1 + weight (Zhang & Sennrich 2019; Gemma).

    Written out, because XLA fuses these five operations and has no kernel to call.
    """

    def __init__(self, width: int, eps: float, zero_centered: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan"), dtype=torch.float32))
        self.eps = eps
        self.zero_centered = zero_centered
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.scale()).to(self.compute_dtype)

    def scale(self) -> Tensor:
        """What a normalised value is multiplied by."""
        return 1.0 + self.weight if self.zero_centered else self.weight


def make_norm(config: ModelConfig, compute_dtype: torch.dtype) -> nn.Module:
    """The configured normalisation over the residual stream's width."""
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, config.norm_eps, config.bias, compute_dtype)
    return RMSNorm(config.d_model, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)


def make_head_norm(config: ModelConfig, compute_dtype: torch.dtype) -> RMSNorm:
    """The normalisation of one query or key head: always RMS, zero-centred where the others are."""
    return RMSNorm(config.heads_dim, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)
