"""Causal self-attention. B batch, T query tokens, S key tokens, H query heads, K key/value heads, E head width."""

from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.layers import Linear, RMSNorm, RotaryTables, rotate


class Heads(NamedTuple):
    """Queries, keys and values by head; query head h reads key/value head h // (H / K)."""

    query_BHTE: Tensor
    key_BKTE: Tensor
    value_BKTE: Tensor


class KeyValueCache(Protocol):
    """Attention over tokens of earlier calls as well; see `generate/cache.py`."""

    def attend(self, heads: Heads) -> Tensor:
        """heads_BHTE of the next layer; called once for each layer, in order."""


Segments = Tensor | KeyValueCache | None
"""Which tokens a token attends to. A tensor (B, T): those before it in its document, whose number (int32) this holds. None:
all those before it. A cache: those that the cache says."""


def attend(heads: Heads, segments_BT: Tensor | None, config: ModelConfig, dropout: float = 0.0) -> Tensor:
    """Causal attention over one sequence, softmax(cap(query · key * scale)) · value (Vaswani et al. 2017): heads_BHTE.

    segments_BT: see `Segments`. config: scale, cap and implementation. dropout: probability of dropping an attention weight.
    """
    if config.attention == "reference" or config.attention_softcap is not None:  # the fused kernels cannot cap scores
        return reference_attention(heads, segments_BT, config, dropout)
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril()[:, None]
    causal, grouped, scale = mask_B1TS is None, config.num_heads != config.kv_heads, attention_scale(config)
    return F.scaled_dot_product_attention(*heads, mask_B1TS, dropout, causal, scale=scale, enable_gqa=grouped)


def reference_attention(heads: Heads, segments_BT: Tensor | None, config: ModelConfig, dropout: float = 0.0) -> Tensor:
    """`attend`, written out. The scores (B, K, G, T, S), G = H / K, are in memory, and in fp32 up to the softmax.

    The query heads of a group are laid end to end along T, so that keys and values are never repeated.
    """
    query_BHTE, key_BKTE, value_BKTE = heads
    (B, H, T, E), K = query_BHTE.shape, key_BKTE.shape[1]
    query_BKRE = query_BHTE.reshape(B, K, H // K * T, E)
    scores_BKRS = (query_BKRE @ key_BKTE.transpose(-2, -1)).float() * attention_scale(config)
    if (cap := config.attention_softcap) is not None:
        scores_BKRS = cap * torch.tanh(scores_BKRS / cap)
    mask = torch.full((T, T), float("-inf"), device=query_BHTE.device).triu(1)
    if segments_BT is not None:
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        mask = torch.where(same_BTS, mask, float("-inf"))[:, None, None]
    weights_BKGTS = torch.softmax(scores_BKRS.view(B, K, H // K, T, T) + mask, dim=-1).to(value_BKTE.dtype)
    if dropout:
        weights_BKGTS = F.dropout(weights_BKGTS, dropout)
    return (weights_BKGTS.view(B, K, H // K * T, T) @ value_BKTE).view(B, H, T, E)


def attention_scale(config: ModelConfig) -> float:
    """The factor on query-key products."""
    return config.query_scale or config.heads_dim**-0.5


class Attention(nn.Module):
    """Project to heads, attend, project back."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        query_width, key_width = config.num_heads * config.heads_dim, config.kv_heads * config.heads_dim
        self.query = Linear(config.d_model, query_width, config.bias)
        self.key = Linear(config.d_model, key_width, config.bias)
        self.value = Linear(config.d_model, key_width, config.bias)
        self.output = Linear(query_width, config.d_model, config.bias)
        norm = (config.heads_dim, config.norm_eps, config.norm == "rmsnorm_zero_centered", compute_dtype)
        self.query_norm = RMSNorm(*norm) if config.qk_norm else None
        self.key_norm = RMSNorm(*norm) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """Mix tokens. x_BTD: normalised, in the compute type. rotary: tables for these T tokens; None means no rotary
        positions."""
        heads = self.split_heads(self.query(x_BTD), self.key(x_BTD), self.value(x_BTD), rotary)
        return cast(Tensor, self.output(self.attend(heads, segments).transpose(1, 2).flatten(2)))

    def split_heads(self, query_BTF: Tensor, key_BTF: Tensor, value_BTF: Tensor, rotary: RotaryTables | None) -> Heads:
        """The projections by head; queries and keys normalised and rotated."""
        query, key, value = (
            x_BTF.unflatten(-1, (-1, self.config.heads_dim)).transpose(1, 2)
            for x_BTF in (query_BTF, key_BTF, value_BTF)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return Heads(query, key, value)

    def attend(self, heads: Heads, segments: Segments) -> Tensor:
        """heads_BHTE, each a mean of values."""
        if segments is not None and not isinstance(segments, Tensor):
            return segments.attend(heads)
        return attend(heads, segments, self.config, self.config.dropout if self.training else 0.0)
