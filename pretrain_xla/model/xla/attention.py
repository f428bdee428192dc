"""Attention and the feed-forward layer of the TPU's version: with a kernel, and with values saved for recomputation."""

from __future__ import annotations

import dataclasses
from typing import Protocol, cast

from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Attention, Heads, Segments, reference_attention
from pretrain_xla.model.layers import FeedForward, RotaryTables
from pretrain_xla.model.xla.saved import SAVE_NOTHING, Save


@dataclasses.dataclass(frozen=True)
class KernelInputs:
    """What an attention kernel computes from: the projections as they are, heads side by side.

    Attributes:
        query_BTF: queries, F = H * E.
        key_BTS: keys, S = K * E.
        value_BTS: values.
        query_norm_E, key_norm_E: factors on a normalised query or key head. None means they are not normalised.
        rotary: tables for the rotation that follows the norm. None means none follows.
        segments_BT: number (int32) of each token's document, within which it attends. None means all is one document.
    """

    query_BTF: Tensor
    key_BTS: Tensor
    value_BTS: Tensor
    query_norm_E: Tensor | None
    key_norm_E: Tensor | None
    rotary: RotaryTables | None
    segments_BT: Tensor | None


class AttentionKernel(Protocol):
    """Causal attention where a machine has a kernel for it."""

    def __call__(self, inputs: KernelInputs, config: ModelConfig, save: Save) -> Tensor | None:
        """heads_BTF, its outputs saved for recomputation. None means the kernel cannot do this."""


class XlaAttention(Attention):
    """`Attention` by a kernel, or written out.

    XLA has no fused attention of its own, and would lower PyTorch's to all-fp32 matrix products around two more passes over
    the scores: without a kernel, the reference, which multiplies in the compute type, is the faster one.
    """

    kernel: AttentionKernel | None

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None,
        segments: Segments = None,
        save: Save = SAVE_NOTHING,
        row_factors_BT1: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`.

        save: gets the products and the attention. row_factors_BT1: what `FactoredRMSNorm.factors` gave with x_BTD.
        """
        query_BTF, key_BTS, value_BTS = (
            save(project(x_BTD, row_factors_BT1)) for project in (self.query, self.key, self.value)
        )
        heads_BTF = self._run_kernel(query_BTF, key_BTS, value_BTS, rotary, segments, save)
        if heads_BTF is None:
            heads = self.split_heads(query_BTF, key_BTS, value_BTS, rotary)
            heads_BTF = save(self.attend(heads, segments).transpose(1, 2).flatten(2))
        return save(cast(Tensor, self.output(heads_BTF)))

    def attend(self, heads: Heads, segments: Segments) -> Tensor:
        """See `Attention.attend`."""
        if segments is None or isinstance(segments, Tensor):
            return reference_attention(heads, segments, self.config, self.config.dropout if self.training else 0.0)
        return segments.attend(heads)

    def _run_kernel(
        self,
        query_BTF: Tensor,
        key_BTS: Tensor,
        value_BTS: Tensor,
        rotary: RotaryTables | None,
        segments: Segments,
        save: Save,
    ) -> Tensor | None:
        plain = self.config.attention == "reference" or (self.config.dropout and self.training)
        if self.kernel is None or plain or not (segments is None or isinstance(segments, Tensor)):
            return None
        query_norm, key_norm = (None if norm is None else norm.scale() for norm in (self.query_norm, self.key_norm))
        inputs = KernelInputs(query_BTF, key_BTS, value_BTS, query_norm, key_norm, rotary, segments)
        return self.kernel(inputs, self.config, save)


class XlaFeedForward(FeedForward):
    """`FeedForward` that saves its first products."""

    def forward(self, x_BTD: Tensor, save: Save = SAVE_NOTHING) -> Tensor:
        """See `FeedForward.forward`."""
        up_BTF = save(self.up(x_BTD))
        if self.gate is None:
            return cast(Tensor, self.down(self.activation(up_BTF)))
        return cast(Tensor, self.down(self.activation(save(self.gate(x_BTD))) * up_BTF))
