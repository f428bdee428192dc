"""What a model counts: its parameters, and the floating-point operations of a token.

The convention is PaLM's (Chowdhery et al. 2022, appendix B), which published utilisation figures use: a multiply-add is
2 operations; only matrix products count; attention counts all T x T pairs (not halved for the causal mask, nor less where
documents are kept apart); backward is twice forward; recomputation does not count; the head counts, the embedding look-up
does not. Both use the real vocabulary: padding belongs to the hardware, not to the model.
"""

from pretrain_xla.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model without the vocabulary's padding rows: GPT-2 small has 124,439,808."""
    norm = config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    block_norms = (4 if config.post_norm else 2) * norm + (2 * config.heads_dim if config.qk_norm else 0)
    block = _block_matrices(config) + (_block_biases(config) if config.bias else 0) + block_norms
    vocabulary = config.vocab_size * config.d_model * (1 if config.tie_weights else 2)
    positions = config.seq_length * config.d_model if config.positions == "learned" else 0
    return vocabulary + positions + config.num_layers * block + norm * (2 if config.embedding_norm else 1)


def forward_flops_per_token(config: ModelConfig) -> int:
    """Operations of the forward pass, for one token of a sequence of `seq_length`."""
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.d_model
    heads_width = config.num_heads * config.heads_dim
    attention = 2 * config.num_layers * heads_width * config.seq_length
    return 2 * (matrices + attention)


def flops_per_token(config: ModelConfig) -> int:
    """Operations of forward and backward for one trained token: 6 N + 12 L H E T, N the parameters in matrices."""
    return 3 * forward_flops_per_token(config)


def _block_matrices(config: ModelConfig) -> int:
    heads = config.heads_dim * (2 * config.num_heads + 2 * config.kv_heads)
    return config.d_model * (heads + config.d_ff * (3 if config.gated else 2))


def _block_biases(config: ModelConfig) -> int:
    heads = config.heads_dim * (config.num_heads + 2 * config.kv_heads)
    return heads + config.d_ff * (2 if config.gated else 1) + 2 * config.d_model
