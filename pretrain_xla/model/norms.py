"""Normalisations: computed in fp32 whatever comes in, emitted in the model's compute type."""

from typing import Any

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

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Normalise the last dimension. source: what x is a copy of, if it is one; mean and variance are read from there."""
        if source is not None:
            normed = _LayerNormOfCopy.apply(source.float(), x.float(), self.weight, self.bias, self.eps)
        else:
            normed = F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.to(self.compute_dtype)


class _LayerNormOfCopy(torch.autograd.Function):
    """Mean and variance from one tensor, in one pass over it; all else from a copy of it, to which the gradient belongs.

    The variance is E[x²] - E[x]², as XLA computes it for `F.layer_norm`, too.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, copy: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        mean = source.mean(dim=-1, keepdim=True)
        variance = (source.square().mean(dim=-1, keepdim=True) - mean.square()).clamp(min=0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(copy, weight, mean, scale)
        ctx.has_bias = bias is not None
        scaled = (copy - mean) * scale * weight
        return scaled if bias is None else scaled + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        copy, weight, mean, scale = ctx.saved_tensors
        standard, grad = (copy - mean) * scale, grads[0] * weight
        along = (grad * standard).mean(dim=-1, keepdim=True)
        grad_copy = scale * (grad - grad.mean(dim=-1, keepdim=True) - standard * along)
        grad_bias = grads[0].flatten(0, -2).sum(0) if ctx.has_bias else None
        return None, grad_copy, (grads[0] * standard).flatten(0, -2).sum(0), grad_bias, None


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

    def factors(self, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, as two factors, of which the second may wait until after a linear map of the first.

        A compiler then gets the sums of squares and the first factor in one pass over x: the first needs no sum.

        Args:
            x: values (…, width).
            copy: x again, or a copy, which the backward pass reads; all of the gradient flows into it.

        Returns:
            values: x times `scale`, in the compute type. Whatever is made of them must be linear in them and be multiplied by
                the second factor: the backward pass relies on it.
            rows: one over the root mean square of each row, fp32, (…, 1). No gradient flows into it: `values` gets that
                of both.
        """
        values, rows = _Factors.apply(x.float(), copy.float(), self.scale(), self.eps, self.compute_dtype)
        return values, rows

    def scale(self) -> Tensor:
        """What a normalised value is multiplied by."""
        return 1.0 + self.weight if self.zero_centered else self.weight


class _Factors(torch.autograd.Function):
    """`RMSNorm.factors`. With y a row of x, r its factor and v = y * scale: y moves the loss L through v and through r.

    As all that is made of v is linear and is multiplied by r, r dL/dr = v · dL/dv, so that no second gradient need come in;
    and dr/dy = -r³ y / width.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(copy, scale, rows)
        ctx.mark_non_differentiable(rows)
        return (x * scale).to(dtype), rows

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, scale, rows = ctx.saved_tensors
        grad_values = grads[0].float()
        grad_x = grad_values * scale
        through_rows = x * (rows.square() * (x * grad_x).mean(dim=-1, keepdim=True))
        grad_scale = (grad_values * x).flatten(0, -2).sum(0)
        return None, grad_x - through_rows, grad_scale, None, None


def make_norm(config: ModelConfig, compute_dtype: torch.dtype) -> nn.Module:
    """The configured normalisation over the residual stream's width."""
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, config.norm_eps, config.bias, compute_dtype)
    return RMSNorm(config.d_model, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)


def make_head_norm(config: ModelConfig, compute_dtype: torch.dtype) -> RMSNorm:
    """The normalisation of one query or key head: always RMS, zero-centred where the others are."""
    return RMSNorm(config.heads_dim, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)
