"""The decoder-only transformer that every configuration of `ModelConfig` describes, from GPT-2 to Gemma 2.

This file, `attention.py`, `layers.py` and `loss.py` are the whole model in plain PyTorch: what runs on GPUs and CPUs, and the
reference that the TPU's version (`xla/`) is tested against. Weights are fp32; matrix products run in `compute_dtype`, by
explicit casts, also the one that gives the logits, which are then cast to fp32. The residual stream, norms, softmax and the
loss are computed in fp32. Nothing depends on a value, only on shapes.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Attention, Segments
from pretrain_xla.model.documents import positions_within
from pretrain_xla.model.layers import Embedding, FeedForward, Linear, RotaryTables, make_norm, rotary_tables
from pretrain_xla.model.loss import cross_entropy

ROTARY_BUFFERS = ("rotary_cos", "rotary_sin")
PADDING_LOGIT = -1e30
"""Logit of a padding row: its softmax is exactly 0 in fp32, and 0 * it is 0, where 0 * -inf would be NaN."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with `post_norm`, each branch is normalised once more."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, compute_dtype)
        self.attention = Attention(config, compute_dtype)
        self.attention_post_norm = make_norm(config, compute_dtype) if config.post_norm else None
        self.feed_forward_norm = make_norm(config, compute_dtype)
        self.feed_forward = FeedForward(config)
        self.feed_forward_post_norm = make_norm(config, compute_dtype) if config.post_norm else None
        self.compute_dtype, self.dropout = compute_dtype, config.dropout

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """One layer over the fp32 residual stream; for `rotary` and `segments` see `Attention.forward`."""
        attended_BTD = self.attention(self.attention_norm(x_BTD), rotary, segments)
        x_BTD = x_BTD + self.finish(attended_BTD, self.attention_post_norm)
        fed_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD + self.finish(fed_BTD, self.feed_forward_post_norm)

    def finish(self, branch_BTD: Tensor, post_norm: nn.Module | None) -> Tensor:
        """A branch as it is added to the residual stream."""
        return _drop(branch_BTD if post_norm is None else post_norm(branch_BTD), self.dropout, self.training)


class Blocks(nn.ModuleList):
    """The blocks, one after the other."""

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """All layers over the residual stream; for `rotary` and `segments` see `Attention.forward`."""
        for block in self:
            x_BTD = block(x_BTD, rotary, segments)
        return x_BTD


class GPT(nn.Module):
    """Tokens in, logits or loss out.

    A new model's weights are NaN: call `initialize(model, seed)` or load a state dict. The rotary tables are buffers outside
    the state dict; after `to_empty` (a model built on the meta device) call `reset_buffers()`.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        self.embedding_norm = make_norm(config, torch.float32) if config.embedding_norm else None
        learned = config.positions == "learned"
        self.position_embedding = Embedding(config.seq_length, config.d_model) if learned else None
        self.blocks: nn.Module = Blocks(Block(config, compute_dtype) for _ in range(config.num_layers))
        self.final_norm = make_norm(config, compute_dtype)
        self.head = None if config.tie_weights else Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.positions == "rotary":
            for name in ROTARY_BUFFERS:
                self.register_buffer(name, torch.empty(config.seq_length, config.heads_dim // 2), persistent=False)
        self.reset_buffers()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, segments: Segments = None) -> Tensor:
        """Predict each next token: logits_BTV (fp32) of the real vocabulary, or with targets their mean cross-entropy (nats).

        tokens_BT: token ids, int32 or int64, at most `seq_length` long; more are a ValueError. targets_BT: the ids that should
        follow; -100 leaves one out. segments: with those of `documents.number_documents`, each document is as if alone.
        """
        x_BTD = self.hidden(tokens_BT, segments=segments)
        return self.logits(x_BTD) if targets_BT is None else self.loss(x_BTD, targets_BT)

    def hidden(self, tokens_BT: Tensor, positions: Tensor | None = None, segments: Segments = None) -> Tensor:
        """All but the head: the normalised residual stream x_BTD, in the compute type.

        positions: of the tokens [T], or [B, T] where they differ by row. None means 0 … T - 1; learned ones are then counted
            within each document (rotary attention sees differences only, which are the same within a document).
        """
        if (length := tokens_BT.shape[1]) > self.config.seq_length:
            raise ValueError(f"{length} tokens are longer than seq_length={self.config.seq_length}: cut them")
        x_BTD = self.embedding(tokens_BT)
        x_BTD = x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        if self.position_embedding is not None:
            own = positions_within(segments) if positions is None and isinstance(segments, Tensor) else positions
            x_BTD = x_BTD + (self.position_embedding.weight[:length] if own is None else self.position_embedding(own))
        x_BTD = _drop(x_BTD, self.config.dropout, self.training)
        x_BTD = self.blocks(x_BTD, self._rotary(length, positions), segments)
        return cast(Tensor, self.final_norm(x_BTD))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores (fp32) of the real vocabulary for the output of `hidden`, or for some of its tokens."""
        return self._padded_logits(x_BTD)[..., : self.config.vocab_size]

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy for the output of `hidden`. Padding is masked, not cropped: a sharded V keeps even shards."""
        logits_BTV, size = self._padded_logits(x_BTD), self.config.vocab_size
        if size < self.config.padded_vocab_size:
            is_token_V = torch.arange(self.config.padded_vocab_size, device=x_BTD.device) < size
            logits_BTV = torch.where(is_token_V, logits_BTV, PADDING_LOGIT)
        return cross_entropy(logits_BTV, targets_BT)

    def reset_buffers(self) -> None:
        """Fill the rotary tables with their values, on whatever device they are."""
        config = self.config
        if config.positions == "rotary":
            tables = rotary_tables(config.seq_length, config.heads_dim, config.rope_theta)
            for name, table in zip(ROTARY_BUFFERS, tables, strict=True):
                self.get_buffer(name).copy_(table)

    def _padded_logits(self, x_BTD: Tensor) -> Tensor:
        if self.head is None:
            logits_BTV = F.linear(x_BTD, self.embedding.weight.to(x_BTD.dtype)).float()
        else:
            logits_BTV = self.head(x_BTD).float()
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def _rotary(self, length: int, positions: Tensor | None) -> RotaryTables | None:
        """The rows of the rotary tables for these tokens."""
        if self.config.positions != "rotary":
            return None
        tables = (self.get_buffer(name) for name in ROTARY_BUFFERS)
        cos, sin = (table[:length] if positions is None else table[positions].unsqueeze(-3) for table in tables)
        return cos, sin


def _drop(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate) if rate and training else x
