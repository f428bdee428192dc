"""Rotary positions (Su et al. 2021), in the half-split layout of Llama, Qwen and Gemma.

Channel i of a head turns together with channel i + E/2, by the angle position * theta ** (-2i / E). The tables hold one
half, since both halves turn alike.
"""

import torch
from torch import Tensor

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, E/2) in fp32, or (B, 1, T, E/2) where positions differ by row."""


def rotary_tables(length: int, head_dim: int, theta: float) -> RotaryTables:
    """Cosine and sine of every position's angles, on the CPU, in fp32 as `transformers` computes them."""
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, tables: RotaryTables) -> Tensor:
    """Turn each head by its token's position; fp32 inside, x's type outside."""
    cos, sin = tables
    first, second = x_BHTE.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BHTE.dtype)
