"""Gradient clipping by global norm, inside the compiled step: the norm and the factor stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def squared_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The square of each gradient's L2 norm: [P] float32. NaN or infinite where the gradient is."""
    return torch.stack([gradient.float().square().sum() for gradient in gradients])


@torch.no_grad()
def clip_by_global_norm(
    gradients: Sequence[Tensor], max_norm: float, unit: Tensor | None = None, squares_P: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Scale gradients so that their global L2 norm is at most `max_norm`.

    Args:
        gradients: before clipping.
        max_norm: upper bound of the norm; 0 disables clipping, and only the norm is computed.
        unit: 0-d divisor of the gradients, applied first and in the same pass over them. None means 1.
        squares_P: their `squared_norms`, if they have been computed.

    Returns:
        The gradients, and their norm before clipping (0-d float32).
    """
    norm = (squared_norms(gradients) if squares_P is None else squares_P).sum().sqrt()
    norm = norm if unit is None else norm / unit
    if max_norm == 0.0 and unit is None:
        return list(gradients), norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    factor = factor if unit is None else factor / unit
    return list(torch._foreach_mul(list(gradients), factor)), norm
