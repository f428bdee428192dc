"""The models of `jax_step.py` in JAX: parameters as a tree, and the loss as a function of them.

Idiomatic JAX: no modules, no hand-written backward pass, no kernel except JAX's own Pallas attention. Where there was a choice,
the faster step by the TPU compiler's figures was chosen; the comments say which.

The parameter tree has the names of our state dict (`params["blocks"][0]["attention"]["query"]["weight"]`), with matrices of
shape (in, out), for `x @ weight`. Shapes: B batch, T tokens, S tokens + 1, D model width, H heads, E head width, F
feed-forward width, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from pretrain_xla.config import ModelConfig

Tree = Any
"""Nested dicts and lists of arrays."""

Attend = Callable[[Array, Array, Array], Array]
"""(query_BHTE, key_BHTE, value_BHTE) → heads_BHTE."""

RotaryTables = tuple[np.ndarray, np.ndarray]
"""Cosines, and sines with the first half negated, each (T, E) in fp32."""

PADDING_LOGIT = -1e30


def params_from_torch(state_dict: Mapping[str, Any], model: ModelConfig) -> Tree:
    """The state dict of our `GPT` (values that NumPy can read) as this module's tree; linear matrices are transposed."""
    params: Tree = {"blocks": [{} for _ in range(model.num_layers)]}
    for name, tensor in state_dict.items():
        *path, leaf = name.split(".")
        node = params
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        value = np.array(tensor)  # a copy: the torch side updates its own in place
        node[leaf] = jnp.asarray(value.T if value.ndim == 2 and "embedding" not in name else value)
    return params


def init_params(key: Array, model: ModelConfig) -> Tree:
    """GPT-2's initialization: normal(0.02), divided by sqrt(2 layers) for projections into the residual stream."""
    heads_width = model.num_heads * model.heads_dim
    # As in GPT-2, linear layers and LayerNorm have biases.
    norm_bias = model.bias and model.norm == "layernorm"
    names = iter(range(2**16))

    def matrix(rows: int, columns: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(jax.random.fold_in(key, next(names)), (rows, columns))

    def linear(fan_in: int, fan_out: int, std: float = 0.02) -> Tree:
        weight = {"weight": matrix(fan_in, fan_out, std)}
        return weight | {"bias": jnp.zeros(fan_out)} if model.bias else weight

    def norm(width: int, bias: bool) -> Tree:
        weight = {"weight": jnp.ones(width)}
        return weight | {"bias": jnp.zeros(width)} if bias else weight

    def block() -> Tree:
        residual_std = 0.02 / math.sqrt(2 * model.num_layers)
        attention = {name: linear(model.d_model, heads_width) for name in ("query", "key", "value")}
        attention["output"] = linear(heads_width, model.d_model, residual_std)
        if model.qk_norm:
            attention |= {name: norm(model.heads_dim, False) for name in ("query_norm", "key_norm")}
        feed_forward = {name: linear(model.d_model, model.d_ff) for name in ("up", "gate")[: 1 + model.gated]}
        feed_forward["down"] = linear(model.d_ff, model.d_model, residual_std)
        return {
            "attention_norm": norm(model.d_model, norm_bias),
            "attention": attention,
            "feed_forward_norm": norm(model.d_model, norm_bias),
            "feed_forward": feed_forward,
        }

    params: Tree = {
        "embedding": {"weight": matrix(model.padded_vocab_size, model.d_model)},
        "blocks": [block() for _ in range(model.num_layers)],
        "final_norm": norm(model.d_model, norm_bias),
    }
    if model.positions == "learned":
        params["position_embedding"] = {"weight": matrix(model.seq_length, model.d_model)}
    return params


def loss_of(
    params: Tree,
    tokens_BS: Array,
    *,
    model: ModelConfig,
    attend: Attend,
    compute_dtype: jnp.dtype,
    residual_dtype: jnp.dtype,
) -> Array:
    """Mean cross-entropy of the next tokens, fp32, 0-d."""
    tokens_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    x_BTD = params["embedding"]["weight"][tokens_BT].astype(residual_dtype)
    if "position_embedding" in params:
        x_BTD += params["position_embedding"]["weight"].astype(residual_dtype)
    rotary = rotary_tables(model) if model.positions == "rotary" else None
    norm = partial(normalize, model=model, dtype=compute_dtype)
    for block in params["blocks"]:
        x_BTD += attention_layer(block["attention"], norm(block["attention_norm"], x_BTD), model, rotary, attend)
        x_BTD += feed_forward(block["feed_forward"], norm(block["feed_forward_norm"], x_BTD), model)
    x_BTD = norm(params["final_norm"], x_BTD)
    # The logits are written once, in the compute type; each fp32 pass over them is fused into its consumer.
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, params["embedding"]["weight"].astype(compute_dtype))
    return cross_entropy(logits_BTV.astype(jnp.float32), targets_BT, model.vocab_size)


def cross_entropy(logits_BTV: Array, targets_BT: Array, vocab_size: int) -> Array:
    """Mean over tokens of log-sum-exp(logits) - logits[target], without the vocabulary's padding.

    The target's logit is selected by comparison: the backward pass of a gather (optax's own loss) is a scatter over B, T, V.
    """
    ids_V = jnp.arange(logits_BTV.shape[-1])
    logits_BTV = jnp.where(ids_V < vocab_size, logits_BTV, PADDING_LOGIT)
    target_logits_BT = jnp.where(ids_V == targets_BT[..., None], logits_BTV, 0.0).sum(-1)
    return (jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT).mean()


def attention_layer(
    params: Tree, x_BTD: Array, model: ModelConfig, rotary: RotaryTables | None, attend: Attend
) -> Array:
    """Project to heads, attend, project back."""
    query_BHTE, key_BHTE, value_BHTE = (_heads(params[name], x_BTD, model) for name in ("query", "key", "value"))
    if model.qk_norm:
        query_BHTE = normalize(params["query_norm"], query_BHTE, model, x_BTD.dtype)
        key_BHTE = normalize(params["key_norm"], key_BHTE, model, x_BTD.dtype)
    if rotary is not None:
        query_BHTE, key_BHTE = rotate(query_BHTE, rotary), rotate(key_BHTE, rotary)
    heads_BHTE = attend(query_BHTE, key_BHTE, value_BHTE)
    weight_HED = params["output"]["weight"].astype(x_BTD.dtype).reshape(model.num_heads, model.heads_dim, model.d_model)
    return _add_bias(jnp.einsum("bhte,hed->btd", heads_BHTE, weight_HED), params["output"])


def _heads(params: Tree, x_BTD: Array, model: ModelConfig) -> Array:
    """x @ weight + bias as (B, H, T, E), which the kernel reads.

    An einsum, not a product, reshape and transpose: the transpose is then part of the matrix product. Between steps the weights
    are (D, H * E), because a last dimension of 64 would be padded to 128 in memory.
    """
    weight_DHE = params["weight"].astype(x_BTD.dtype).reshape(model.d_model, model.num_heads, model.heads_dim)
    heads_BHTE = jnp.einsum("btd,dhe->bhte", x_BTD, weight_DHE)
    if "bias" not in params:
        return heads_BHTE
    return heads_BHTE + params["bias"].astype(x_BTD.dtype).reshape(model.num_heads, 1, model.heads_dim)


def feed_forward(params: Tree, x_BTD: Array, model: ModelConfig) -> Array:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated."""
    hidden_BTF = linear(params["up"], x_BTD)
    activation = ACTIVATIONS[model.activation]
    hidden_BTF = activation(linear(params["gate"], x_BTD)) * hidden_BTF if model.gated else activation(hidden_BTF)
    return linear(params["down"], hidden_BTF)


def linear(params: Tree, x: Array) -> Array:
    """x @ weight + bias, in the type of x."""
    return _add_bias(x @ params["weight"].astype(x.dtype), params)


def _add_bias(x: Array, params: Tree) -> Array:
    return x + params["bias"].astype(x.dtype) if "bias" in params else x


def normalize(params: Tree, x: Array, model: ModelConfig, dtype: jnp.dtype) -> Array:
    """LayerNorm, or RMSNorm (always for a head), of the last dimension: fp32 inside, `dtype` outside."""
    x = x.astype(jnp.float32)
    mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
    if model.norm == "layernorm":
        # The variance from the mean square, as in flax: both sums are then fused into the product that wrote x, in one pass.
        mean = x.mean(axis=-1, keepdims=True)
        normed = (x - mean) * jax.lax.rsqrt(mean_square - jnp.square(mean) + model.norm_eps)
    else:
        normed = x * jax.lax.rsqrt(mean_square + model.norm_eps)
    normed = normed * params["weight"]
    return (normed + params["bias"] if "bias" in params else normed).astype(dtype)


def rotary_tables(model: ModelConfig) -> RotaryTables:
    """Cosine and signed sine of position * theta ** (-2i / E), as constants of the compiled step."""
    exponents = np.arange(0, model.heads_dim, 2, dtype=np.float32) / model.heads_dim
    angles = np.outer(np.arange(model.seq_length, dtype=np.float32), np.float32(1.0) / model.rope_theta**exponents)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((cos, cos), axis=-1), np.concatenate((-sin, sin), axis=-1)


def rotate(x_BHTE: Array, tables: RotaryTables) -> Array:
    """Rotate channel i together with channel i + E/2; fp32 inside, x's type outside.

    The halves of a head are swapped by a product with a permutation matrix, which is exact. Slicing and concatenating them, as
    on other devices, moves data across the lanes of a register, and is slower (docs/LOG.md, "The step by the TPU compiler's
    figures").
    """
    cos, sin = tables
    head_dim = x_BHTE.shape[-1]
    swap_EE = np.roll(np.eye(head_dim), head_dim // 2, axis=1)
    swapped_BHTE = x_BHTE @ jnp.asarray(swap_EE, x_BHTE.dtype)
    return (x_BHTE.astype(jnp.float32) * cos + swapped_BHTE.astype(jnp.float32) * sin).astype(x_BHTE.dtype)


def _reference(query_BHTE: Array, key_BHTE: Array, value_BHTE: Array, scale: float) -> Array:
    """Causal attention that materialises its scores (B, H, T, T)."""
    length = query_BHTE.shape[2]
    scores_BHTS = jnp.einsum("bhte,bhse->bhts", query_BHTE, key_BHTE).astype(jnp.float32) * scale
    scores_BHTS = jnp.where(np.tri(length, dtype=bool), scores_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(value_BHTE.dtype)
    return jnp.einsum("bhts,bhse->bhte", weights_BHTS, value_BHTE)


def _splash(query_BHTE: Array, key_BHTE: Array, value_BHTE: Array, scale: float) -> Array:
    """JAX's newer Pallas kernel: one backward kernel, and one number saved for each row, where the older saves 128."""
    heads, length = query_BHTE.shape[1:3]
    block = min(512, length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    # It takes one sequence, and has no scale argument.
    return jax.vmap(kernel)(query_BHTE * jnp.asarray(scale, query_BHTE.dtype), key_BHTE, value_BHTE)


def _flash(query_BHTE: Array, key_BHTE: Array, value_BHTE: Array, scale: float) -> Array:
    """JAX's older Pallas kernel, which torch_xla wraps."""
    length = query_BHTE.shape[2]
    # For the queries' gradient, one number per row is broadcast to block_k_major_dq columns in memory, so keep that small: see
    # docs/LOG.md, "The step by the TPU compiler's figures".
    block, narrow = min(1024, length), min(256, length)
    sizes = flash.BlockSizes(
        block_b=1,
        block_q=block,
        block_k_major=block,
        block_k=block,
        block_q_major_dkv=block,
        block_q_dkv=block,
        block_k_major_dkv=block,
        block_k_dkv=block,
        block_q_dq=block,
        block_k_major_dq=narrow,
        block_k_dq=narrow,
    )
    return flash.flash_attention(query_BHTE, key_BHTE, value_BHTE, causal=True, sm_scale=scale, block_sizes=sizes)


ATTENTION = {"splash": _splash, "flash": _flash, "reference": _reference}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
