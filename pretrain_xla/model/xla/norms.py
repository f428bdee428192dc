"""The first norm of a block, in the forms in which a TPU computes it with fewest passes over the residual stream.

Both have `factors`: normalised values, of which a factor for each row may be left to be multiplied in later, and which may be
computed from a copy of the input (`layer_scan.py` says why there is one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain_xla.model.layers import LayerNorm, RMSNorm


class CopyLayerNorm(LayerNorm):
    """`LayerNorm` that can read mean and variance from a tensor, and all else from a copy of it."""

    def factors(self, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, None]:
        """What `forward` gives, and no factor. source: what x is a copy of. None means x is no copy."""
        if source is None:
            return self(x), None
        normed: Tensor = _LayerNormOfCopy.apply(source.float(), x.float(), self.weight, self.bias, self.eps)
        return normed.to(self.compute_dtype), None


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


class FactoredRMSNorm(RMSNorm):
    """`RMSNorm` that can leave the division until after the linear map of its result."""

    def factors(self, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` gives, as two factors, of which the second may wait until after a linear map of the first.

        A compiler then gets the sums of squares and the first factor in one pass over x: the first needs no sum.

        Args:
            x: values (…, width); all of the gradient flows into it.
            source: what x is a copy of; the forward pass reads it, and the backward pass reads x. None means x is no copy.

        Returns:
            values: x times `scale`, in the compute type. Whatever is made of them must be linear in them and be multiplied by
                the second factor: the backward pass relies on it.
            row_factors: one over the root mean square of each row, fp32, (…, 1). No gradient flows into it: `values` gets
                that of both.
        """
        read = x if source is None else source
        values, factors = _Factors.apply(read.float(), x.float(), self.scale(), self.eps, self.compute_dtype)
        return values, factors


class _Factors(torch.autograd.Function):
    """`FactoredRMSNorm.factors`. With y a row of x, r its factor and v = y * scale: y moves the loss L through v and through r.

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
