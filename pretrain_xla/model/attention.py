"""Causal self-attention, with grouped key/value heads, query/key norms, rotary positions and a soft-cap.

`attend` is the one place where query meets key, behind a table of implementations that must agree (the tests hold them
to it). Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K, E head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.layers import Linear
from pretrain_xla.model.norms import RMSNorm, make_head_norm
from pretrain_xla.model.positions import RotaryTables, rotate
from pretrain_xla.model.remember import remember

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query_BHTE, key_BKTE, value_BKTE) → heads_BHTE."""


def _reference(
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    segments_BT: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Written out: scores (B, K, G, T, T) are real, in fp32 from the scaling to the softmax.

    The query heads of a group are laid end to end along T, so that keys and values are never repeated.
    """
    B, H, T, E = query_BHTE.shape
    K = key_BKTE.shape[1]
    query_BKRE = query_BHTE.reshape(B, K, H // K * T, E)
    scores_BKRS = (query_BKRE @ key_BKTE.transpose(-2, -1)).float() * scale
    if softcap is not None:
        scores_BKRS = softcap * torch.tanh(scores_BKRS / softcap)
    mask = torch.full((T, T), float("-inf"), device=query_BHTE.device).triu(1)
    if segments_BT is not None:
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        mask = torch.where(same_BTS, mask, float("-inf"))[:, None, None]
    weights_BKGTS = torch.softmax(scores_BKRS.view(B, K, H // K, T, T) + mask, dim=-1).to(value_BKTE.dtype)
    if dropout:
        weights_BKGTS = F.dropout(weights_BKGTS, dropout)
    return (weights_BKGTS.view(B, K, H // K * T, T) @ value_BKTE).view(B, H, T, E)


def _sdpa(
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    segments_BT: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """PyTorch's fused kernels: the scores never reach memory. With documents kept apart, a mask (B, 1, T, T) does.

    They cannot cap scores. And XLA has none, and would lower this call to all-fp32 matrix products around two more passes
    over the scores: there, the reference, which multiplies in the compute type, is the faster one where no `Kernel` is.
    """
    if query_BHTE.device.type == "xla" or softcap is not None:
        return _reference(query_BHTE, key_BKTE, value_BKTE, segments_BT, scale, softcap, dropout)
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril()[:, None]
    return F.scaled_dot_product_attention(
        query_BHTE,
        key_BKTE,
        value_BKTE,
        attn_mask=mask_B1TS,
        is_causal=mask_B1TS is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query_BHTE.shape[1] != key_BKTE.shape[1],
    )


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None, float], Tensor]] = {
    "reference": _reference,
    "sdpa": _sdpa,
}


def attend(
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    *,
    implementation: str,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    training: bool = False,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention over one sequence: softmax(cap(query · key * scale)) · value (Vaswani et al. 2017).

    Args:
        query_BHTE: queries; query head h reads key/value head h // (H / K).
        key_BKTE: keys, of the same length T.
        value_BKTE: values.
        implementation: a key of `IMPLEMENTATIONS`.
        scale: factor on query-key products, before the cap.
        softcap: bound c on the scores, as c * tanh(score / c) (Gemma 2); none: no bound.
        dropout: probability of dropping an attention weight, when `training`.
        training: whether dropout is on.
        segments_BT: number of each token's document; tokens attend within theirs. None: all is one document.

    Returns:
        heads_BHTE, in the type of the inputs.
    """
    rate = dropout if training else 0.0
    return IMPLEMENTATIONS[implementation](query_BHTE, key_BKTE, value_BKTE, segments_BT, scale, softcap, rate)


@dataclasses.dataclass(frozen=True)
class HeadsSpec:
    """What a kernel must know of the heads besides their tensors; see `ModelConfig`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    norm_eps: float


class Kernel(Protocol):
    """Causal attention on the projections as they are, heads side by side, where a machine has a kernel for that."""

    def __call__(
        self,
        query_BTF: Tensor,
        key_BTS: Tensor,
        value_BTS: Tensor,
        spec: HeadsSpec,
        norms: tuple[Tensor | None, Tensor | None],
        rotary: RotaryTables | None,
        segments_BT: Tensor | None,
    ) -> Tensor | None:
        """Attend.

        Args:
            query_BTF: queries, F = H * E.
            key_BTS: keys, S = K * E.
            value_BTS: values.
            spec: the heads.
            norms: weights (E,) of the query and the key norm, by which a normalised head is multiplied, or none.
            rotary: tables for the turn that follows the norm, or none.
            segments_BT: number (int32) of each token's document, beyond which it does not look, or none.

        Returns:
            heads_BTF, or none where the kernel cannot do this.
        """


class Attention(nn.Module):
    """Project to heads, attend, project back. `kernel` is set by the runtime where there is one."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        query_width = config.num_heads * config.heads_dim
        key_width = config.kv_heads * config.heads_dim
        # The gradients of these three outputs come out of attention, not out of a matrix product.
        self.query = Linear(config.d_model, query_width, config.bias, sum_by_product=True)
        self.key = Linear(config.d_model, key_width, config.bias, sum_by_product=True)
        self.value = Linear(config.d_model, key_width, config.bias, sum_by_product=True)
        self.output = Linear(query_width, config.d_model, config.bias)
        self.query_norm: RMSNorm | None = make_head_norm(config, compute_dtype) if config.qk_norm else None
        self.key_norm: RMSNorm | None = make_head_norm(config, compute_dtype) if config.qk_norm else None
        self.head_dim = config.heads_dim
        self.implementation = config.attention
        self.dropout = config.dropout
        scale = config.query_scale or config.heads_dim**-0.5
        self.spec = HeadsSpec(
            config.num_heads, config.kv_heads, config.heads_dim, scale, config.attention_softcap, config.norm_eps
        )
        self.kernel: Kernel | None = None

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None,
        attend: Attend | None = None,
        segments_BT: Tensor | None = None,
        rows_BT1: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, each with those before it and itself.

        Args:
            x_BTD: normalised input, in the compute type.
            rotary: tables for these T tokens; none: no rotary turn.
            attend: what to do with the heads instead of `attend` over these tokens (generation looks into its cache).
            segments_BT: number (int32) of each token's document; tokens attend within theirs. None: all is one document.
            rows_BT1: the second of `RMSNorm.factors`, where the input is the first.
        """
        query_BTF = remember(self.query(x_BTD, rows_BT1))
        key_BTS, value_BTS = remember(self.key(x_BTD, rows_BT1)), remember(self.value(x_BTD, rows_BT1))
        heads_BTF = None if attend is not None else self._run_kernel(query_BTF, key_BTS, value_BTS, rotary, segments_BT)
        if heads_BTF is None:
            query_BHTE = self._split_heads(query_BTF, self.query_norm, rotary)
            key_BKTE = self._split_heads(key_BTS, self.key_norm, rotary)
            value_BKTE = self._split_heads(value_BTS, None, None)
            if attend is None:
                heads_BHTE = self._attend(query_BHTE, key_BKTE, value_BKTE, segments_BT)
            else:
                heads_BHTE = attend(query_BHTE, key_BKTE, value_BKTE)
            heads_BTF = remember(heads_BHTE.transpose(1, 2).flatten(2))
        return remember(self.output(heads_BTF))

    def _run_kernel(
        self,
        query_BTF: Tensor,
        key_BTS: Tensor,
        value_BTS: Tensor,
        rotary: RotaryTables | None,
        segments_BT: Tensor | None,
    ) -> Tensor | None:
        if self.kernel is None or self.implementation == "reference" or (self.dropout and self.training):
            return None
        query_scale = None if self.query_norm is None else self.query_norm.scale()
        key_scale = None if self.key_norm is None else self.key_norm.scale()
        return self.kernel(query_BTF, key_BTS, value_BTS, self.spec, (query_scale, key_scale), rotary, segments_BT)

    def _split_heads(self, x_BTF: Tensor, norm: nn.Module | None, rotary: RotaryTables | None) -> Tensor:
        heads_BHTE = x_BTF.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if norm is not None:
            heads_BHTE = norm(heads_BHTE)
        return heads_BHTE if rotary is None else rotate(heads_BHTE, rotary)

    def _attend(self, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, segments_BT: Tensor | None) -> Tensor:
        return attend(
            query_BHTE,
            key_BKTE,
            value_BKTE,
            implementation=self.implementation,
            scale=self.spec.scale,
            softcap=self.spec.softcap,
            dropout=self.dropout,
            training=self.training,
            segments_BT=segments_BT,
        )
