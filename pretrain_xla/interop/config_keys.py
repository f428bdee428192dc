"""Conversion of one option of `ModelConfig` to a key of `config.json`, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain_xla.config import ModelConfig
from pretrain_xla.errors import UserError

# Our name → transformers' name. The second table maps back, and holds aliases.
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu"}
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_python": "gelu_exact",
    "swish": "silu",
}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """An option, or one of `DERIVED`. default: its value if the file omits the key, or a function of the file's tree, which
    applies to null, too.
    """

    option: str
    default: Any = None
    write: Callable[[Any], Any] = _same
    read: Callable[[Any], Any] = _same


def is_inverse_root(value: float | None) -> bool:
    """Whether a query scale is 1 / sqrt(integer), which is all that `query_pre_attn_scalar` can express."""
    scalar = 0 if value is None else round(value**-2)
    return value is None or (scalar > 0 and math.isclose(scalar**-0.5, value, rel_tol=1e-9))


def _read_activation(name: str) -> str:
    if name not in OUR_ACTIVATIONS:
        raise UserError(f"activation {name!r} is none of ours: {', '.join(ACTIVATIONS)}")
    return OUR_ACTIVATIONS[name]


SILU = Key("activation", "silu", ACTIVATIONS.__getitem__, _read_activation)
GELU = Key("activation", "gelu_pytorch_tanh", ACTIVATIONS.__getitem__, _read_activation)
# The original name of the same function, which every version of transformers knows.
GPT2_GELU = Key("activation", "gelu_new", (ACTIVATIONS | {"gelu": "gelu_new"}).__getitem__, _read_activation)
# In Gemma 1 "gelu" means the tanh form, as in its released configs; the exact form is written as "gelu_python".
GEMMA_GELU = Key(
    "activation",
    "gelu_pytorch_tanh",
    (ACTIVATIONS | {"gelu_exact": "gelu_python"}).__getitem__,
    lambda name: _read_activation("gelu_pytorch_tanh" if name == "gelu" else name),
)
SCALAR = Key("scale", 256, lambda scale: round(scale**-2), lambda scalar: scalar**-0.5)


def _write_positions(config: ModelConfig) -> list[int]:
    return [int(config.positions == "rotary")] * config.num_layers


# Quantities that a config.json stores and that we derive from several options.
DERIVED: dict[str, Callable[[ModelConfig], Any]] = {
    "scale": lambda config: config.query_scale or config.heads_dim**-0.5,
    "embedding_scale": lambda config: math.sqrt(config.d_model) if config.scale_embeddings else 1.0,
    "positions_by_layer": _write_positions,
}

# Keys of config.json that several architectures share.
SHAPE = {
    "vocab_size": Key("vocab_size"),
    "max_position_embeddings": Key("seq_length"),
    "hidden_size": Key("d_model"),
    "num_hidden_layers": Key("num_layers"),
    "num_attention_heads": Key("num_heads"),
    "num_key_value_heads": Key("kv_heads"),
    "intermediate_size": Key("d_ff"),
}
HEAD_DIM = {"head_dim": Key("heads_dim")}
RMS = {"rms_norm_eps": Key("norm_eps", 1e-6)}
LLAMA_KEYS = SHAPE | RMS | {"hidden_act": SILU, "tie_word_embeddings": Key("tie_weights", False)}
TIED = {"tie_word_embeddings": Key("tie_weights", True)}
GPT2_KEYS = TIED | {
    "vocab_size": Key("vocab_size"),
    "n_positions": Key("seq_length"),
    "n_embd": Key("d_model"),
    "n_layer": Key("num_layers"),
    "n_head": Key("num_heads"),
    "n_inner": Key("d_ff", lambda raw: 4 * raw["n_embd"]),
    "activation_function": GPT2_GELU,
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
}
GEMMA_KEYS = SHAPE | RMS | HEAD_DIM | TIED
GEMMA3_KEYS = GEMMA_KEYS | {
    "hidden_activation": GELU,
    "query_pre_attn_scalar": SCALAR,
    "final_logit_softcapping": Key("logit_softcap"),
}
GEMMA2_KEYS = GEMMA3_KEYS | {
    "attn_logit_softcapping": Key("attention_softcap", 50.0),
    "final_logit_softcapping": Key("logit_softcap", 30.0),
}
