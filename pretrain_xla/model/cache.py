"""A key/value cache of static shape: what tokens have been attended with is kept, so that the next one costs one token's work.

Each block has a buffer of S slots for the keys of its K key/value heads and one for the values. Rows of a batch end together: a
shorter text begins at a later slot (`Places.first`), so that one slot number, a device value, serves all rows, and writing is
one update in place. What stands before a row's first slot, or after the newest, is never looked at; a token's position is
counted from its row's first slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Attend

FAR_BELOW = -1e30
"""A score that softmax turns into 0; finite, so that no row of scores can become NaN."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the T tokens of a call stand.

    Attributes:
        slots: their slots, int64 [T], the same for all rows.
        first: slot of each row's first token, int64 [B].
    """

    slots: Tensor
    first: Tensor

    def positions(self) -> Tensor:
        """Each token's position in its row [B, T]; 0 for what stands before the first."""
        return (self.slots - self.first[:, None]).clamp(min=0)

    def allowed(self, count: int) -> Tensor:
        """Which of `count` slots each token may look at, [B, 1, T, S]: its row's up to its own, and always its own."""
        slots_S = torch.arange(count, device=self.slots.device)
        own_TS = slots_S == self.slots[:, None]
        row_BTS = (slots_S >= self.first[:, None, None]) & (slots_S <= self.slots[:, None])
        return (row_BTS | own_TS)[:, None]


def fill(config: ModelConfig, places: Places, slots: int, cache: list[Tensor]) -> list[Attend]:
    """For each block: attention of a prompt over itself.

    Args:
        config: the architecture.
        places: of the prompt, in slots 0 … T - 1.
        slots: S of the cache to make, at least T; 0: make none.
        cache: an empty list, to which each block adds its keys and its values `[B, K, S, E]`.
    """
    length = len(places.slots)
    allowed_B1TT = places.allowed(length)

    def attend(query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor) -> Tensor:
        if slots:
            # New tensors: an update of a part in place leaves XLA with the whole as a second result.
            cache.extend(F.pad(new_BKTE, (0, 0, 0, slots - length)) for new_BKTE in (key_BKTE, value_BKTE))
        return attend_where(query_BHTE, key_BKTE, value_BKTE, allowed_B1TT, config)

    return [attend] * config.num_layers


def extend(config: ModelConfig, cache: Sequence[Tensor], places: Places) -> list[Attend]:
    """For each block: attention of new tokens over the cache of `fill`, which their keys and values join first, in place."""
    allowed_B1TS = places.allowed(cache[0].shape[2])

    def attend_of(key_BKSE: Tensor, value_BKSE: Tensor) -> Attend:
        def attend(query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor) -> Tensor:
            key_BKSE.index_copy_(2, places.slots, key_BKTE)
            value_BKSE.index_copy_(2, places.slots, value_BKTE)
            return attend_where(query_BHTE, key_BKSE, value_BKSE, allowed_B1TS, config)

        return attend

    return [attend_of(cache[2 * index], cache[2 * index + 1]) for index in range(config.num_layers)]


def attend_where(
    query_BHTE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, allowed_B1TS: Tensor, config: ModelConfig
) -> Tensor:
    """Attention of T queries over S keys where `allowed`: heads_BHTE.

    PyTorch's fused kernels where `attention.attend` would take them, else written out in fp32 as the reference is; the query
    heads of a group are laid end to end, so that keys and values are never repeated.
    """
    scale = config.query_scale or config.heads_dim**-0.5
    softcap = config.attention_softcap
    B, H, T, E = query_BHTE.shape
    K, S = key_BKSE.shape[1:3]
    if config.attention == "sdpa" and softcap is None and query_BHTE.device.type != "xla":
        return F.scaled_dot_product_attention(
            query_BHTE, key_BKSE, value_BKSE, attn_mask=allowed_B1TS, scale=scale, enable_gqa=H != K
        )
    query_BKRE = query_BHTE.reshape(B, K, H // K * T, E)
    if H // K * T < S:  # one token: turn its scores, not the whole cache, which some compilers would copy
        products_BKRS = (key_BKSE @ query_BKRE.transpose(-2, -1)).transpose(-2, -1)
    else:
        products_BKRS = query_BKRE @ key_BKSE.transpose(-2, -1)
    scores_BKRS = products_BKRS.float() * scale
    if softcap is not None:
        scores_BKRS = softcap * torch.tanh(scores_BKRS / softcap)
    scores_BKGTS = scores_BKRS.reshape(B, K, H // K, T, S).masked_fill(~allowed_B1TS[:, None], FAR_BELOW)
    weights_BKRS = torch.softmax(scores_BKGTS, dim=-1).to(value_BKSE.dtype).view(B, K, H // K * T, S)
    return (weights_BKRS @ value_BKSE).view(B, H, T, E)
