"""Names and storage of the tensors of each architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Names = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Names of tensors.

    layers: prefix of a layer's number. outer, inner: our module → the architecture's, outside and inside the layers. fused: its
    module → those of ours that it concatenates, in order. transposed: matrices of layers are stored as [in, out].
    always_biased: our modules that always have a bias there; it is zero if our model has none.
    """

    layers: str
    outer: Names
    inner: Names
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: bool = False
    always_biased: tuple[str, ...] = ()


OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
HEAD_NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
PLAIN_FEED_FORWARD = {"feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj"}
FEED_FORWARD = PLAIN_FEED_FORWARD | {"feed_forward.gate": "mlp.gate_proj"}
NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
NORM_MODULES = ("attention_norm", "feed_forward_norm", "final_norm")
GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
LLAMA_LAYOUT = Layout("model.layers", OUTER, ATTENTION | FEED_FORWARD | NORMS)
QWEN3_LAYOUT = Layout("model.layers", OUTER, ATTENTION | HEAD_NORMS | FEED_FORWARD | NORMS)
GPT2_INNER = {
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
}
GPT2_LAYOUT = Layout(
    "transformer.h",
    {
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    GPT2_INNER,
    fused={"attn.c_attn": ("attention.query", "attention.key", "attention.value")},
    transposed=True,
    always_biased=(*GPT2_INNER, "final_norm"),
)
BIGCODE_LAYOUT = Layout(
    "transformer.h", GPT2_LAYOUT.outer, GPT2_INNER, GPT2_LAYOUT.fused, always_biased=GPT2_LAYOUT.always_biased
)
