"""The architecture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain_xla.config.section import Layers, PositiveFloat, Section, Size

MOST_WEIGHTS = 10**13


class ModelConfig(Section):
    """The architecture. The defaults are GPT-2 124M's; configs/ has modern architectures."""

    vocab_size: Size = 50257
    """Number of token ids. If it is not set, that of the shards' dataset.json. The embedding is padded to a multiple of
    vocab_multiple, which never changes the loss."""
    vocab_multiple: Size = 128
    """Pad the rows of the embedding to a multiple of this (128 is the width of the TPU's matrix unit)."""
    seq_length: Size = 512
    """Tokens in a training sequence, and number of learned positions."""
    d_model: Size = 768
    """Width of the residual stream."""
    num_layers: Layers = 12
    """Number of transformer blocks, up to 1024."""
    num_heads: Size = 12
    """Number of query heads."""
    num_kv_heads: Size | None = None
    """Number of key/value heads (grouped-query attention). None means num_heads."""
    head_dim: Size | None = None
    """Width of a head. None means d_model / num_heads."""
    d_ff: Size = 3072
    """Width of the feed-forward layer (of each of its two branches if gated)."""
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "silu"] = "gelu"
    """Activation function of the feed-forward layer. gelu is the tanh approximation, as in GPT-2; gelu_exact uses erf, as in
    nanoGPT; relu2 is the squared ReLU."""
    gated: bool = False
    """Gate the feed-forward layer: with silu this is SwiGLU, with gelu GeGLU."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"] = "layernorm"
    """Normalisation. rmsnorm_zero_centered multiplies by (1 + weight), as in Gemma."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every normalisation."""
    post_norm: bool = False
    """Also normalise the output of attention and of the feed-forward layer, before it is added to the residual stream."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """Position encoding: learned embeddings, rotary (RoPE), or none."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths (theta)."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    qk_norm: bool = False
    """RMSNorm on each query and key head, before the rotary encoding."""
    query_scale: PositiveFloat | None = None
    """Scale of the attention scores. None means head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    """Soft cap on attention scores: cap * tanh(score / cap). None means no cap."""
    logit_softcap: PositiveFloat | None = None
    """Soft cap on the output logits: cap * tanh(logit / cap). None means no cap."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    embedding_norm: bool = False
    """Normalise token embeddings before anything is added to them. `export` folds it into the table of an untied embedding."""
    tie_weights: bool = False
    """Share the weights of the token embedding and the output layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on embeddings, attention weights and both residual branches."""
    init: Literal["gpt2", "normal", "fan_in", "mup"] = "gpt2"
    """gpt2: std 0.02, residual projections divided by sqrt(2 * num_layers). normal: std 0.02 everywhere. fan_in: std
    1/sqrt(fan-in), residual projections zero. mup: the same, with std 1 for the embeddings and zero for the output layer,
    unless they share weights."""
    attention: Literal["sdpa", "reference"] = "sdpa"
    """sdpa: a fused kernel if there is one for these heads (on TPUs our flash attention, elsewhere PyTorch's), else as
    reference. reference: plain matrix products and an fp32 softmax."""

    @property
    def heads_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}: "
                "change one of them, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.positions == "rotary" and self.heads_dim % 2:
            raise ValueError(f"head_dim={self.heads_dim} is odd, but rotary positions rotate pairs: make it even")
        if self._weights > MOST_WEIGHTS:
            raise ValueError(
                f"num_layers={self.num_layers}, d_model={self.d_model}, d_ff={self.d_ff} and vocab_size={self.vocab_size} make "
                f"about {self._weights:.0e} parameters, more than any device can hold: check them for typing errors"
            )
        return self

    @property
    def _weights(self) -> int:
        """Number of parameters in matrices and embeddings."""
        heads = 2 * self.heads_dim * (self.num_heads + self.kv_heads)
        rows = self.padded_vocab_size + (self.seq_length if self.positions == "learned" else 0)
        return self.d_model * (rows + self.num_layers * (heads + (3 if self.gated else 2) * self.d_ff))
