"""The architecture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain_xla.config.section import Layers, PositiveFloat, Section, Size

MOST_WEIGHTS = 10**13


class ModelConfig(Section):
    """The transformer. The defaults are GPT-2 124M; `configs/` has the modern ones."""

    vocab_size: Size = 50257
    """Number of token ids; left out: that of the dataset.json of the shards. The embedding is padded to `vocab_multiple`;
    padding never changes the loss."""
    vocab_multiple: Size = 128
    """Pad the embedding's rows to a multiple of this (128: the width of the TPU's matrix unit)."""
    seq_length: Size = 512
    """Tokens in a training sequence, and the number of learned positions."""
    d_model: Size = 768
    """Width of the residual stream."""
    num_layers: Layers = 12
    """Number of transformer blocks, up to 1024."""
    num_heads: Size = 12
    """Number of query heads."""
    num_kv_heads: Size | None = None
    """Number of key/value heads (grouped-query attention). None means as many as query heads."""
    head_dim: Size | None = None
    """Width of a head. None means d_model / num_heads."""
    d_ff: Size = 3072
    """Width of the feed-forward layer (of each of its two branches when gated)."""
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "silu"] = "gelu"
    """Feed-forward nonlinearity; gelu is the tanh form, as in GPT-2, and gelu_exact the one with erf, as in nanoGPT."""
    gated: bool = False
    """Gate the feed-forward layer: silu gives SwiGLU, gelu gives GeGLU."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"] = "layernorm"
    """Normalisation; zero_centered multiplies by (1 + weight), as in Gemma."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every normalisation."""
    post_norm: bool = False
    """Normalise also the output of attention and feed-forward, before it joins the residual stream."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How tokens know their place."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    qk_norm: bool = False
    """RMS-normalise each query and key head before rotary positions."""
    query_scale: PositiveFloat | None = None
    """Factor on query-key products. None means head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    """Squash attention scores: cap * tanh(score / cap)."""
    logit_softcap: PositiveFloat | None = None
    """Squash the final logits: cap * tanh(logit / cap)."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    tie_weights: bool = False
    """Use the token embedding as the output head too."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping, on embeddings, attention weights and both residual branches."""
    init: Literal["gpt2", "normal", "fan_in"] = "gpt2"
    """gpt2: normal(0.02), residual projections divided by sqrt(2 layers); normal: normal(0.02) throughout; fan_in: std
    1/sqrt(fan-in), residual projections zero."""
    attention: Literal["sdpa", "reference"] = "sdpa"
    """sdpa: the machine's fused kernel, where it has one for these heads (TPU: ours; elsewhere PyTorch's); reference: plain
    matrix products around an fp32 softmax."""

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
            raise ValueError(f"head_dim={self.heads_dim} is odd, and rotary positions rotate pairs: make it even")
        if self._weights > MOST_WEIGHTS:
            raise ValueError(
                f"num_layers={self.num_layers}, d_model={self.d_model}, d_ff={self.d_ff} and vocab_size={self.vocab_size} make "
                f"about {self._weights:.0e} parameters, which no machine holds: look for a slip of the keys in one of them"
            )
        return self

    @property
    def _weights(self) -> int:
        """Parameters in matrices and tables."""
        heads = 2 * self.heads_dim * (self.num_heads + self.kv_heads)
        rows = self.padded_vocab_size + (self.seq_length if self.positions == "learned" else 0)
        return self.d_model * (rows + self.num_layers * (heads + (3 if self.gated else 2) * self.d_ff))
