"""Orthogonalization of matrices by Newton-Schulz iterations: matrix products only, which is what accelerators are made for.

For a matrix with singular value decomposition U S V^T this approximates U V^T: every singular value becomes about 1. Each
iteration applies an odd polynomial a s + b s^3 + c s^5 to the singular values. QUINTIC repeats Keller Jordan's polynomial
(https://kellerjordan.github.io/posts/muon/), which leaves them between about 0.7 and 1.2. `polar_express` computes the
polynomials of Amsel et al. 2025 (https://arxiv.org/abs/2505.16932, algorithm 1): each is the best one for what the iterations
before it have left, so that the same number of iterations comes closer to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
"""Coefficients of s, s^3 and s^5."""

QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
SMALLEST = 1e-3
"""Singular values below this are not brought to 1; the paper's choice for bf16."""
SAFETY = 1.01
"""Each polynomial of `polar_express` is made for singular values this much larger: rounding may carry them past the bound, and
there the iteration would diverge."""
CUSHION = 0.024
"""Smallest ratio of the least to the largest singular value that a polynomial is made for, as in the paper. Without it the
first polynomials would serve the smallest values alone, and move the others too far for bf16."""


@torch.no_grad()
def orthogonalize(
    matrices_NRC: Tensor, polynomials: Sequence[Polynomial], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The nearest semi-orthogonal matrix to each of N matrices of R rows and C columns, approximately.

    Args:
        matrices_NRC: of any size; an all-zero matrix stays zero. One device's share, or all of them.
        polynomials: one for each iteration.
        dtype: of the products. The iteration corrects its own rounding, so bf16 is enough.

    Returns:
        N matrices R x C, in `dtype`.
    """
    X_NMK = matrices_NRC.to(dtype)
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    if tall:  # the smaller Gram matrix of the two
        X_NMK = X_NMK.mT
    norm_N11 = X_NMK.float().square().sum((-2, -1), keepdim=True).sqrt()
    X_NMK = (X_NMK.float() / norm_N11.clamp(min=1e-7)).to(dtype)
    for a, b, c in polynomials:
        gram_NMM = X_NMK @ X_NMK.mT
        X_NMK = a * X_NMK + (b * gram_NMM + c * (gram_NMM @ gram_NMM)) @ X_NMK
    return X_NMK.mT if tall else X_NMK


@cache
def polar_express(iterations: int) -> tuple[Polynomial, ...]:
    """Polynomials for matrices whose singular values lie between `SMALLEST` and 1."""
    low, high = SMALLEST, 1.0
    found = []
    for _ in range(iterations):
        a, b, c = _best_quintic(max(low, CUSHION * high), high)
        # With a cushion the polynomial is centered for other bounds than the real ones: center it on those again.
        values = [a * s + b * s**3 + c * s**5 for s in (low, high)]
        center = 2.0 / sum(values)
        a, b, c = a * center, b * center, c * center
        found.append((a / SAFETY, b / SAFETY**3, c / SAFETY**5))
        low = sum(factor * low ** (2 * power + 1) for power, factor in enumerate((a, b, c)))
        high = 2.0 - low
    return tuple(found)


def _best_quintic(low: float, high: float) -> Polynomial:
    """The odd quintic whose largest distance from 1 on [low, high] is the smallest, by Remez' exchange algorithm.

    At the best one the error is equal, with alternating sign, at both ends and at two extrema between them.
    """
    if low / high > 1 - 5e-6:  # the system is singular there; this is its limit, Newton-Schulz' own polynomial
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    previous = np.inf
    while True:
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        if abs(error - previous) < 1e-15:
            return float(a), float(b), float(c)
        previous = error
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-1.0, 1.0]) * root) / (10 * c))
