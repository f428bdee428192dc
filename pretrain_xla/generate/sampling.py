"""From logits to a token: temperature, top-k, top-p. On the host, so that a seed means the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain_xla.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. temperature: 0 takes the likeliest. top_k: only the k likeliest, 0 for all. top_p: only the
    fewest that together reach this probability, 1 for all (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise UserError(f"--temperature {self.temperature} is not a number to divide by: use 0 (greedy) or more")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} is negative: use 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} is negative: use 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is outside (0, 1]: use 1 for no limit")


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token.

    Args:
        logits_V: fp32 scores of the vocabulary, on the host.
        sampling: the rule; with temperature 0 nothing is drawn.
        generator: source of chance, advanced by one draw.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The highest becomes 0 first, so that a tiny temperature gives 0 and -inf, and never inf / inf.
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    probabilities_V = torch.softmax(_filtered(scaled_V, sampling), dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def _filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top-k and top-p at minus infinity; the likeliest token always stays."""
    if 0 < sampling.top_k < len(logits_V):
        kept = torch.topk(logits_V, sampling.top_k)
        logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, kept.indices, kept.values)
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True)
        probabilities_V = torch.softmax(sorted_V, dim=-1)
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        kept_V = sorted_V.masked_fill(before_V >= sampling.top_p, -torch.inf)
        logits_V = torch.empty_like(logits_V).scatter(0, order_V, kept_V)
    return logits_V
