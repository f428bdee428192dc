"""The decoder-only transformer that every configuration of `ModelConfig` describes, from GPT-2 to Gemma-2's kin.

Types: weights are fp32; matrix products run in `compute_dtype`, by explicit casts; the residual stream, norms, softmax,
logits after the head and the loss are fp32 (what autocast does, in plain sight). Nothing here depends on a value, only
on shapes, and nothing is made on the host during `forward`: XLA compiles one graph for one shape.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Attend, Attention
from pretrain_xla.model.documents import positions_within
from pretrain_xla.model.execution import Execution
from pretrain_xla.model.feed_forward import FeedForward
from pretrain_xla.model.layers import Embedding, Linear
from pretrain_xla.model.loops import python_loop
from pretrain_xla.model.loss import PADDING_LOGIT, Head, cross_entropy, linear_cross_entropy
from pretrain_xla.model.norms import LayerNorm, RMSNorm, make_norm
from pretrain_xla.model.positions import RotaryTables, rotary_tables
from pretrain_xla.model.stack import run_blocks
from pretrain_xla.model.stacked import StackedBlocks


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with post_norm, each branch is normalised once more.

    factored: divide queries, keys and values by the root mean square, and not what they are made of: the same up to rounding,
        and a pass less over the residual stream where a compiler fuses. Not in fp16, which may not hold such products.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype, factored: bool = False) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.attention_norm = make_norm(config, compute_dtype)
        self.factored = factored and isinstance(self.attention_norm, RMSNorm) and compute_dtype != torch.float16
        self.takes_copy = self.factored or isinstance(self.attention_norm, LayerNorm)
        self.attention = Attention(config, compute_dtype)
        self.attention_post_norm = make_norm(config, compute_dtype) if config.post_norm else None
        self.feed_forward_norm = make_norm(config, compute_dtype)
        self.feed_forward = FeedForward(config)
        self.feed_forward_post_norm = make_norm(config, compute_dtype) if config.post_norm else None
        self.dropout = config.dropout

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None,
        attend: Attend | None = None,
        segments_BT: Tensor | None = None,
        source_BTD: Tensor | None = None,
    ) -> Tensor:
        """One layer over the fp32 residual stream; the other arguments are `Attention.forward`'s.

        source_BTD: what x_BTD is a copy of, if it is one; the first pass reads this. For a block that `takes_copy`.
        """
        norm: Any = self.attention_norm
        rows_BT1 = None
        if self.factored:
            normed_BTD, rows_BT1 = norm.factors(x_BTD if source_BTD is None else source_BTD, x_BTD)
        else:
            normed_BTD = norm(x_BTD) if source_BTD is None else norm(x_BTD, source_BTD)
        attended_BTD = self.attention(normed_BTD, rotary, attend, segments_BT, rows_BT1)
        x_BTD = x_BTD + self._finish(attended_BTD, self.attention_post_norm)
        fed_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD + self._finish(fed_BTD, self.feed_forward_post_norm)

    def _finish(self, branch_BTD: Tensor, post_norm: nn.Module | None) -> Tensor:
        if post_norm is not None:
            branch_BTD = post_norm(branch_BTD)
        return _drop(branch_BTD, self.dropout, self.training)


class GPT(nn.Module):
    """Tokens in, logits or loss out.

    A new model's weights are NaN: call `initialize(model, seed)` or load a state dict. The rotary tables and the
    vocabulary mask are buffers outside the state dict, right from the start; after `to_empty` (building on the meta
    device) call `reset_buffers()`.

    Args:
        config: the architecture.
        compute_dtype: type of matrix products; the weights stay fp32.
        execution: how it is run.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor
    vocab_mask: Tensor

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, execution: Execution | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.execution = execution or Execution()
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.position_embedding = Embedding(config.seq_length, config.d_model) if learned else None
        self.blocks: nn.ModuleList | StackedBlocks = nn.ModuleList(
            Block(config, compute_dtype, self.execution.loop is not None) for _ in range(config.num_layers)
        )
        self.final_norm = make_norm(config, compute_dtype)
        self.head = None if config.tie_weights else Linear(config.d_model, config.padded_vocab_size, bias=False)
        for name, value in self._buffer_values().items():
            self.register_buffer(name, torch.empty_like(value, device=self.embedding.weight.device), persistent=False)
        self.reset_buffers()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Predict each next token.

        Args:
            tokens_BT: token ids, int32 or int64, at most `seq_length` long.
            targets_BT: the ids that should follow (-100: leave this one out), or none.
            segments_BT: number of each token's document (`documents.number_documents`), so that each document gets what it
                would get alone; none: all is one document.

        Returns:
            With targets the mean cross-entropy (fp32, 0-d, nats), else logits_BTV (fp32) of the real vocabulary.

        Raises:
            ValueError: the tokens are longer than `seq_length`.
        """
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        if targets_BT is None:
            return self.logits(x_BTD)
        execution = self.execution
        if execution.loop is None and execution.loss_chunk is None:
            return cross_entropy(self._masked_logits(x_BTD), targets_BT)  # fused kernels on GPU and CPU
        table = self.embedding if self.head is None else self.head
        loop = execution.loop or python_loop
        head = Head(self.config.vocab_size, self.config.logit_softcap, execution.loss_chunk, loop, execution.split)
        return linear_cross_entropy(x_BTD, table.weight.to(x_BTD.dtype), targets_BT, head)

    def hidden(
        self,
        tokens_BT: Tensor,
        positions: Tensor | None = None,
        attends: Sequence[Attend] | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """All but the head: the normalised residual stream x_BTD, in the compute type.

        Args:
            tokens_BT: token ids.
            positions: the tokens' positions [T], or [B, T] where they differ by row, on the device; none: 0 … T - 1.
            attends: for each block, what stands in for causal attention over these tokens (a key/value cache).
            segments_BT: see `forward`; not with the two before it. Learned positions begin anew in each document. Rotary
                ones need not: attention sees their differences only, and those within a document are the same.
        """
        length = tokens_BT.shape[1]
        if length > self.config.seq_length:
            raise ValueError(f"{length} tokens are longer than seq_length={self.config.seq_length}: cut them")
        x_BTD = self.embedding(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        if self.position_embedding is not None:
            if segments_BT is None:
                x_BTD = x_BTD + _rows(self.position_embedding.weight, length, positions)
            else:
                x_BTD = x_BTD + self.position_embedding(positions_within(segments_BT))
        x_BTD = _drop(x_BTD, self.config.dropout, self.training)
        rotary = None
        if self.config.positions == "rotary":
            rotary = (_rows(self.rotary_cos, length, positions), _rows(self.rotary_sin, length, positions))
            if positions is not None and positions.dim() == 2:
                rotary = (rotary[0][:, None], rotary[1][:, None])  # one row's angles for all of its heads
        if attends is not None:
            block: Any
            for block, attend in zip(self.blocks, attends, strict=True):
                x_BTD = block(x_BTD, rotary, attend)
        else:
            x_BTD = run_blocks(self.blocks, x_BTD, rotary, segments_BT, self.execution)
        return cast(Tensor, self.final_norm(x_BTD))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """fp32 scores of the real vocabulary for the output of `hidden`, whole or some of its tokens."""
        return self._head_logits(x_BTD)[..., : self.config.vocab_size]

    def reset_buffers(self) -> None:
        """Fill the rotary tables and the vocabulary mask with their values, on whatever device they are."""
        for name, value in self._buffer_values().items():
            self.get_buffer(name).copy_(value)

    def _buffer_values(self) -> dict[str, Tensor]:
        """Name → fp32 value of each constant that the model carries, on the CPU."""
        config = self.config
        values: dict[str, Tensor] = {}
        if config.positions == "rotary":
            cos, sin = rotary_tables(config.seq_length, config.heads_dim, config.rope_theta)
            values |= {"rotary_cos": cos, "rotary_sin": sin}
        if config.padded_vocab_size != config.vocab_size:
            mask_V = torch.zeros(config.padded_vocab_size, device="cpu")
            mask_V[config.vocab_size :] = PADDING_LOGIT
            values["vocab_mask"] = mask_V
        return values

    def _head_logits(self, x_BTD: Tensor) -> Tensor:
        if self.head is None:
            logits_BTV = F.linear(x_BTD, self.embedding.weight.to(x_BTD.dtype)).float()
        else:
            logits_BTV = self.head(x_BTD).float()
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def _masked_logits(self, x_BTD: Tensor) -> Tensor:
        """Logits over the padded vocabulary; masked instead of cropped, so that a sharded V keeps its even shards."""
        logits_BTV = self._head_logits(x_BTD)
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits_BTV
        return logits_BTV + self.vocab_mask


def _rows(table: Tensor, length: int, positions: Tensor | None) -> Tensor:
    return table[:length] if positions is None else table[positions]


def _drop(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate) if rate and training else x
