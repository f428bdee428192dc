"""A key/value cache of static shape: it keeps keys and values of earlier tokens, so a new token costs the work of one token.

Each block has a buffer of S slots for the keys of its K key/value heads and one for the values. Rows are left-padded: a shorter
text starts at a later slot (`Places.first`), so that one slot number, a device value, serves all rows, and writing is one
update in place. Slots before a row's first token and after its newest are masked. Positions count from the first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Heads, attention_scale

FAR_BELOW = -1e30
"""A score whose softmax is 0. It is finite, so a row of scores cannot become NaN."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Slots of the T tokens of a call.

    Attributes:
        slots: their slots, int64 [T], the same for all rows.
        first: slot of each row's first token, int64 [B].
    """

    slots: Tensor
    first: Tensor

    def positions(self) -> Tensor:
        """Each token's position in its row [B, T]; 0 for padding before the first token."""
        return (self.slots - self.first[:, None]).clamp(min=0)

    def allowed(self, count: int) -> Tensor:
        """Attention mask [B, 1, T, S] over `count` slots: from the row's first slot to the token's own, and always its own."""
        slots_S = torch.arange(count, device=self.slots.device)
        own_TS = slots_S == self.slots[:, None]
        row_BTS = (slots_S >= self.first[:, None, None]) & (slots_S <= self.slots[:, None])
        return (row_BTS | own_TS)[:, None]


class FillCache:
    """Attention of a prompt over itself, which creates a cache; `model.attention.KeyValueCache`.

    Attributes:
        tensors: keys and values `[B, K, S, E]` of each layer that has attended.
    """

    def __init__(self, config: ModelConfig, places: Places, slots: int) -> None:
        """Start an empty cache.

        Args:
            config: the architecture.
            places: slots of the prompt, 0 … T - 1.
            slots: S of the new cache, at least T; 0 means no cache.
        """
        self.tensors: list[Tensor] = []
        self._config, self._slots, self._length = config, slots, len(places.slots)
        self._allowed_B1TT = places.allowed(self._length)

    def attend(self, heads: Heads) -> Tensor:
        """See `KeyValueCache.attend`."""
        if self._slots:
            # New tensors: with an in-place update of a slice, XLA would return the whole tensor as a second result.
            padding = (0, 0, 0, self._slots - self._length)
            self.tensors.extend(F.pad(new_BKTE, padding) for new_BKTE in (heads.key_BKTE, heads.value_BKTE))
        return attend_where(heads, self._allowed_B1TT, self._config)


class ExtendCache:
    """Attention of new tokens over a cache, after writing their keys and values to it; `model.attention.KeyValueCache`.

    Args:
        config: the architecture.
        places: slots of the new tokens.
        tensors: `FillCache.tensors`.
    """

    def __init__(self, config: ModelConfig, places: Places, tensors: Sequence[Tensor]) -> None:
        self._config, self._slots = config, places.slots
        self._layers = iter(zip(tensors[::2], tensors[1::2], strict=True))
        self._allowed_B1TS = places.allowed(tensors[0].shape[2])

    def attend(self, heads: Heads) -> Tensor:
        """See `KeyValueCache.attend`."""
        key_BKSE, value_BKSE = next(self._layers)
        key_BKSE.index_copy_(2, self._slots, heads.key_BKTE)
        value_BKSE.index_copy_(2, self._slots, heads.value_BKTE)
        return attend_where(Heads(heads.query_BHTE, key_BKSE, value_BKSE), self._allowed_B1TS, self._config)


def attend_where(heads: Heads, allowed_B1TS: Tensor, config: ModelConfig) -> Tensor:
    """Attention of T queries over S keys where `allowed`: heads_BHTE.

    Uses PyTorch's fused kernels if `attention.attend` would, else plain fp32 operations like the reference. The query heads of
    a group are laid end to end, so keys and values are never repeated.
    """
    query_BHTE, key_BKSE, value_BKSE = heads
    scale, softcap = attention_scale(config), config.attention_softcap
    B, H, T, E = query_BHTE.shape
    K, S = key_BKSE.shape[1:3]
    if config.attention == "sdpa" and softcap is None and query_BHTE.device.type != "xla":
        return F.scaled_dot_product_attention(
            query_BHTE, key_BKSE, value_BKSE, attn_mask=allowed_B1TS, scale=scale, enable_gqa=H != K
        )
    query_BKRE = query_BHTE.reshape(B, K, H // K * T, E)
    if H // K * T < S:  # one token: transpose its scores, not the whole cache, which some compilers would copy
        products_BKRS = (key_BKSE @ query_BKRE.transpose(-2, -1)).transpose(-2, -1)
    else:
        products_BKRS = query_BKRE @ key_BKSE.transpose(-2, -1)
    scores_BKRS = products_BKRS.float() * scale
    if softcap is not None:
        scores_BKRS = softcap * torch.tanh(scores_BKRS / softcap)
    scores_BKGTS = scores_BKRS.reshape(B, K, H // K, T, S).masked_fill(~allowed_B1TS[:, None], FAR_BELOW)
    weights_BKRS = torch.softmax(scores_BKGTS, dim=-1).to(value_BKSE.dtype).view(B, K, H // K * T, S)
    return (weights_BKRS @ value_BKSE).view(B, H, T, E)
