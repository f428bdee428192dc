"""The architectures of `transformers` that compute what our model computes: one row each, used for both export and import.

A row states which options the architecture has (`options`), the keys of `config.json` that hold them (`keys`), what else that
file must contain (`required`, `extra`), and the names of its tensors (`layout`). Rows are in order of preference: a model is
exported to the first row that has all of its options, so the widely supported architectures come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain_xla.config import ModelConfig
from pretrain_xla.interop.architecture_options import ANY
from pretrain_xla.interop.config_keys import (
    GELU,
    GEMMA2_KEYS,
    GEMMA3_KEYS,
    GEMMA_GELU,
    GEMMA_KEYS,
    GPT2_KEYS,
    HEAD_DIM,
    LLAMA_KEYS,
    RMS,
    SHAPE,
    TIED,
    Key,
    is_inverse_root,
)
from pretrain_xla.interop.layouts import (
    ATTENTION,
    BIGCODE_LAYOUT,
    FEED_FORWARD,
    GEMMA_NORMS,
    GPT2_LAYOUT,
    HEAD_NORMS,
    LLAMA_LAYOUT,
    NORM_MODULES,
    NORMS,
    OUTER,
    PLAIN_FEED_FORWARD,
    QWEN3_LAYOUT,
    Layout,
)

Options = dict[str, tuple[Any, ...] | Callable[[Any], bool]]
Keys = dict[str, Key]


@dataclass(frozen=True)
class Family:
    """One architecture.

    options: option → accepted values (a tuple, a predicate or `ANY`); one that is not listed must have its value in `PLAIN`.
    keys: key of config.json → our option. required: keys with the only value under which it computes what we do; exported as
    they are. extra: further keys, exported and never read. bias: whether a config.json implies biases. exported: whether models
    are exported to it, or only imported from it. omitted: the values that transformers uses for keys that a config.json omits,
    where they differ from those of `keys`.
    """

    model_type: str
    architecture: str
    options: Options
    keys: Keys
    layout: Layout
    required: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    bias: Callable[[Mapping[str, Any]], bool] = lambda raw: False
    exported: bool = True
    omitted: Mapping[str, Any] = field(default_factory=dict)


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary settings, as transformers 5 reads them and as 4 does."""
    return {
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _biases(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.bias, "mlp_bias": config.bias}


def _full_attention(config: ModelConfig) -> dict[str, Any]:
    """No layer has a sliding window."""
    return {"layer_types": ["full_attention"] * config.num_layers, "sliding_window": config.seq_length}


def _rope_by_layer_type(config: ModelConfig) -> dict[str, Any]:
    rope = _rope(config)["rope_parameters"]
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}} | _full_attention(config)


def _has_biases(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("use_qkv_bias"))


LLAMA_OPTIONS: Options = {
    "norm": ("rmsnorm",),
    "positions": ("rotary",),
    "gated": (True,),
    "bias": ANY,
    "num_kv_heads": ANY,
    "head_dim": ANY,
}
GPT2_OPTIONS: Options = {"norm": ("layernorm",), "positions": ("learned", "none"), "gated": (False,), "bias": ANY}
NO_BIAS: Options = {"bias": (False,)}
UNEVEN_HEADS: Options = {"num_heads": ANY}
GEMMA_OPTIONS: Options = LLAMA_OPTIONS | NO_BIAS | {"norm": ("rmsnorm_zero_centered",), "scale_embeddings": (True,)}
GEMMA2_SCORES: Options = {"query_scale": is_inverse_root, "attention_softcap": ANY, "logit_softcap": ANY}
# transformers applies rotary positions to none of SmolLM3's layers, and yet refuses to open it if a head could not have them.
EVEN_HEAD_DIM: Options = {"heads_dim": lambda width: width % 2 == 0}
MULTIPLIERS = {"residual_multiplier": 1.0, "logits_scaling": 1.0}
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
WINDOW = {"sliding_window": 4096}
GPT2_REQUIRED = {"scale_attn_weights": True, "add_cross_attention": False}

FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2_OPTIONS,
        GPT2_KEYS,
        GPT2_LAYOUT,
        required=GPT2_REQUIRED | {"scale_attn_by_inverse_layer_idx": False},
        # `n_ctx` is what transformers called `n_positions` before, and what llama.cpp's converter asks for.
        extra=lambda config: dict.fromkeys(DROPOUT, config.dropout) | {"n_ctx": config.seq_length},
        bias=lambda raw: True,
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        LLAMA_OPTIONS,
        LLAMA_KEYS | HEAD_DIM,
        LLAMA_LAYOUT,
        extra=lambda config: _rope(config) | _biases(config),
        bias=_has_biases,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        LLAMA_OPTIONS | NO_BIAS | UNEVEN_HEADS | {"qk_norm": (True,)},
        LLAMA_KEYS | {"head_dim": Key("heads_dim", 128)},
        QWEN3_LAYOUT,
        required={"use_sliding_window": False, "attention_bias": False},
        extra=_rope,
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        GEMMA_OPTIONS | UNEVEN_HEADS,
        GEMMA_KEYS | {"hidden_act": GEMMA_GELU},
        LLAMA_LAYOUT,
        required={"attention_bias": False},
        extra=_rope,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA_OPTIONS | GEMMA2_SCORES | {"post_norm": (True,)},
        GEMMA2_KEYS,
        Layout("model.layers", OUTER, ATTENTION | FEED_FORWARD | GEMMA_NORMS),
        required={"attention_bias": False},
        omitted=WINDOW,
        extra=lambda config: _rope(config) | _full_attention(config),
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        {name: values for name, values in LLAMA_OPTIONS.items() if name != "head_dim"}
        | {"query_scale": ANY, "scale_embeddings": ANY},
        LLAMA_KEYS | {"attention_multiplier": Key("scale", 1.0), "embedding_multiplier": Key("embedding_scale", 1.0)},
        LLAMA_LAYOUT,
        required=MULTIPLIERS,
        extra=lambda config: _rope(config) | _biases(config),
        bias=_has_biases,
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {"norm": ("layernorm",), "positions": ("rotary",), "gated": (False,), "bias": ANY, "num_kv_heads": ANY},
        SHAPE | TIED | {"norm_epsilon": Key("norm_eps", 1e-5), "hidden_act": GELU},
        Layout(
            "model.layers",
            OUTER,
            ATTENTION | {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"} | NORMS,
            always_biased=NORM_MODULES,
        ),
        extra=lambda config: _rope(config) | {"use_bias": config.bias, "sliding_window": None},
        bias=lambda raw: True,
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        {"norm": ("layernorm",), "positions": ("rotary",), "gated": (True,), "bias": (False,), "num_kv_heads": ANY},
        {key: value for key, value in LLAMA_KEYS.items() if key not in RMS} | {"layer_norm_eps": Key("norm_eps", 1e-5)},
        Layout("model.layers", OUTER, LLAMA_LAYOUT.inner, always_biased=NORM_MODULES),
        required={"use_parallel_residual": False, "qk_layernorm": False},
        extra=lambda config: {
            "use_qkv_bias": False,
            "partial_rotary_factor": 1.0,
            "rope_parameters": _rope(config)["rope_parameters"] | {"partial_rotary_factor": 1.0},
        },
        bias=lambda raw: True,
        omitted={"partial_rotary_factor": 0.25},
    ),
    Family(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        GPT2_OPTIONS | {"num_kv_heads": (1,)},
        GPT2_KEYS,
        BIGCODE_LAYOUT,
        required=GPT2_REQUIRED | {"multi_query": True},
        extra=lambda config: dict.fromkeys(DROPOUT, config.dropout),
        bias=lambda raw: True,
    ),
    Family(
        "arcee",
        "ArceeForCausalLM",
        LLAMA_OPTIONS | {"gated": (False,)},
        LLAMA_KEYS | HEAD_DIM,
        Layout("model.layers", OUTER, ATTENTION | PLAIN_FEED_FORWARD | NORMS),
        extra=lambda config: _rope(config) | _biases(config),
        bias=_has_biases,
        omitted={"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        LLAMA_OPTIONS | UNEVEN_HEADS | EVEN_HEAD_DIM | {"positions": ("none",)},
        LLAMA_KEYS | HEAD_DIM | TIED | {"no_rope_layers": Key("positions_by_layer")},
        LLAMA_LAYOUT,
        required={"use_sliding_window": False},
        extra=lambda config: _rope(config) | _biases(config),
        bias=_has_biases,
        omitted={"rope_theta": 2_000_000.0},
    ),
    Family(
        "apertus",
        "ApertusForCausalLM",
        LLAMA_OPTIONS | NO_BIAS | UNEVEN_HEADS | {"gated": (False,), "qk_norm": (True,)},
        LLAMA_KEYS | HEAD_DIM,
        Layout(
            "model.layers",
            OUTER,
            ATTENTION
            | HEAD_NORMS
            | PLAIN_FEED_FORWARD
            | {"attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm"},
        ),
        required={"attention_bias": False},
        extra=_rope,
        omitted={
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 12_000_000.0,
            "rope_parameters": {"rope_type": "llama3"},
        },
    ),
    Family(
        "vaultgemma",
        "VaultGemmaForCausalLM",
        GEMMA_OPTIONS | GEMMA2_SCORES,
        GEMMA2_KEYS,
        Layout(
            "model.layers",
            OUTER,
            ATTENTION
            | FEED_FORWARD
            | {"attention_norm": "input_layernorm", "feed_forward_norm": "pre_feedforward_layernorm"},
        ),
        required={"attention_bias": False},
        extra=lambda config: _rope(config) | _full_attention(config),
        omitted=WINDOW,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA_OPTIONS
        | {"query_scale": is_inverse_root, "logit_softcap": ANY, "post_norm": (True,), "qk_norm": (True,)},
        GEMMA3_KEYS,
        Layout("model.layers", OUTER, ATTENTION | HEAD_NORMS | FEED_FORWARD | GEMMA_NORMS),
        # Its config has a key for a cap on attention scores, which its code in transformers ignores.
        required={"attention_bias": False, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
        extra=_rope_by_layer_type,
        omitted=WINDOW | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
    ),
    Family(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        LLAMA_OPTIONS | {"query_scale": ANY, "scale_embeddings": ANY, "post_norm": ANY},
        LLAMA_KEYS
        | HEAD_DIM
        | {
            "attention_multiplier": Key("scale"),
            "embedding_multiplier": Key("embedding_scale", 1.0),
            "use_post_norm": Key("post_norm", True),
        },
        Layout(
            "model.layers",
            OUTER,
            LLAMA_LAYOUT.inner | {"attention_post_norm": "post_norm1", "feed_forward_post_norm": "post_norm2"},
        ),
        required=MULTIPLIERS,
        extra=lambda config: _rope(config) | _biases(config),
        bias=_has_biases,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        LLAMA_OPTIONS | NO_BIAS,
        LLAMA_KEYS | HEAD_DIM,
        LLAMA_LAYOUT,
        exported=False,
        omitted=WINDOW,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        LLAMA_OPTIONS,
        LLAMA_KEYS,
        LLAMA_LAYOUT,
        bias=lambda raw: True,
        exported=False,
    ),
)
"""In order of preference."""
