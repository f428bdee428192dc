"""From logits to tokens, on the device: repetition penalty, temperature, top-k, top-p, min-p, and one draw for each token.

The device has no random generator here. The host sends one uniform number in (0, 1] for each row and token (`draws`), which
picks the token where the cumulative probability reaches it. So a seed gives the same text on every device, in any batch, with
or without cache, as far as the devices agree on the probabilities. Greedy decoding ignores it.

The graph depends on which rules are used (`Rules`), not on their values, which are a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain_xla.errors import UserError


@dataclass(frozen=True)
class Rules:
    """Which parts of `choose` are used. draws: not greedy. sorts: top-k, top-p or min-p. penalizes: repetition penalty."""

    draws: bool
    sorts: bool
    penalizes: bool


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: only the k most likely tokens; 0 means all.
        top_p: of these, only the smallest set with at least this probability (Holtzman et al. 2020); 1 means all.
        min_p: only tokens with at least this fraction of the highest probability (Nguyen et al. 2024); 0 means all.
        repetition_penalty: divides the logit, or multiplies it if negative, of each token that is already in the text
            (Keskar et al. 2019); 1 means no penalty.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise UserError(f"--temperature {self.temperature} is not a number to divide by: use 0 (greedy) or more")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} is negative: use 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} is negative: use 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is outside (0, 1]: use 1 for no limit")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p} is outside [0, 1]: use 0 for no limit")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty {self.repetition_penalty} is not above 0: use 1 for no penalty")

    @property
    def rules(self) -> Rules:
        """Which rules are used."""
        draws = self.temperature > 0
        sorts = draws and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return Rules(draws, sorts, self.repetition_penalty != 1)

    def numbers(self) -> Tensor:
        """The rules' values for `choose`, fp32 [5] on the host."""
        top_k = self.top_k or 2**30
        # Some devices flush subnormal numbers to 0, and dividing by 0 would leave no token to draw.
        temperature = max(self.temperature, 1e-30) if self.temperature > 0 else 0.0
        return torch.tensor([temperature, top_k, self.top_p, self.min_p, self.repetition_penalty])


def draws(seed: int, rows: int, count: int) -> Tensor:
    """Uniform numbers for `count` tokens of each row: fp32 [count, rows] in (0, 1]. A row's do not depend on other rows."""
    columns = [
        1.0 - torch.rand(count, generator=torch.Generator().manual_seed((seed + row * 0x9E3779B97F4A7C15) % 2**63))
        for row in range(rows)
    ]
    return torch.stack(columns, dim=1)


def choose(
    logits_BV: Tensor, rules: Rules, numbers_5: Tensor, chance_B: Tensor, seen_BV: Tensor | None = None
) -> Tensor:
    """Choose each row's next token.

    Args:
        logits_BV: fp32 logits.
        rules: which rules are used.
        numbers_5: their values, `Sampling.numbers()`.
        chance_B: uniform number in (0, 1] for each row; ignored by greedy decoding.
        seen_BV: whether a token is in the row's text; needed with `rules.penalizes`.

    Returns:
        token_B, int32.
    """
    temperature, top_k, top_p, min_p, penalty = numbers_5.unbind()
    if rules.penalizes:
        assert seen_BV is not None
        penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if not rules.draws:
        return logits_BV.argmax(-1).to(torch.int32)
    # Subtract the maximum first, so that a tiny temperature gives 0 and -inf, never inf / inf.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if not rules.sorts:
        return _draw(logits_BV.exp(), chance_B).to(torch.int32)
    sorted_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    weights_BV = _kept(sorted_BV.exp(), top_k, top_p, min_p)
    return token_BV.gather(1, _draw(weights_BV, chance_B)[:, None])[:, 0].to(torch.int32)


def _kept(weights_BV: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set the weights (descending, the first is 1) that a rule excludes to 0; the first always stays."""
    rank_V = torch.arange(weights_BV.shape[-1], device=weights_BV.device)
    weights_BV = torch.where(rank_V < top_k, weights_BV, 0.0)
    reached_BV = weights_BV.cumsum(-1)
    in_nucleus_BV = (reached_BV - weights_BV < top_p * reached_BV[:, -1:]) | (top_p >= 1) | (rank_V == 0)
    return torch.where(in_nucleus_BV & (weights_BV >= min_p), weights_BV, 0.0)


def _draw(weights_BV: Tensor, chance_B: Tensor) -> Tensor:
    """Index of the first element with nonzero weight where the cumulative sum reaches `chance` times the total."""
    reached_BV = weights_BV.cumsum(-1)
    enough_BV = (reached_BV >= chance_B[:, None] * reached_BV[:, -1:]) & (weights_BV > 0)
    return enough_BV.to(torch.int32).argmax(-1)
