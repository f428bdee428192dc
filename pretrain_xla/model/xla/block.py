"""The block of the TPU's version."""

from __future__ import annotations

from torch import Tensor

from pretrain_xla.model.attention import Segments
from pretrain_xla.model.gpt import Block
from pretrain_xla.model.layers import RotaryTables
from pretrain_xla.model.xla.attention import XlaAttention, XlaFeedForward
from pretrain_xla.model.xla.norms import CopyLayerNorm, FactoredRMSNorm
from pretrain_xla.model.xla.saved import SAVE_NOTHING, Save


class XlaBlock(Block):
    """`Block` whose first norm is computed in factors.

    With RMSNorm, queries, keys and values are divided by the root mean square, and not what they are made of: the same up to
    rounding, and a pass less over the residual stream where a compiler fuses.
    """

    attention_norm: CopyLayerNorm | FactoredRMSNorm
    attention: XlaAttention
    feed_forward: XlaFeedForward

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None,
        segments: Segments = None,
        save: Save = SAVE_NOTHING,
        source_BTD: Tensor | None = None,
    ) -> Tensor:
        """See `Block.forward`.

        save: gets what need not be recomputed in the backward pass. source_BTD: what x_BTD is a copy of; the first pass reads
        it instead. None means x_BTD is no copy.
        """
        normed_BTD, row_factors_BT1 = self.attention_norm.factors(x_BTD, source_BTD)
        attended_BTD = self.attention(normed_BTD, rotary, segments, save, row_factors_BT1)
        x_BTD = x_BTD + self.finish(attended_BTD, self.attention_post_norm)
        fed_BTD = self.feed_forward(self.feed_forward_norm(x_BTD), save)
        return x_BTD + self.finish(fed_BTD, self.feed_forward_post_norm)
