"""The same logits as independent implementations, with the same weights."""

import pytest
import torch
import transformers

SHARED = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
LLAMA_NAMES = {
    "embed_tokens": "embedding",
    "layers": "blocks",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.up_proj": "feed_forward.up",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.down_proj": "feed_forward.down",
    "input_layernorm": "attention_norm",
    "lm_head": "head",
}
LLAMA_NORMS = {"post_attention_layernorm": "feed_forward_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
MODERN = {"norm": "rmsnorm", "positions": "rotary", "gated": True, "activation": "silu", "bias": False}


def randomise(model):
    """Noise in every weight: freshly built, norms and biases are the identity and would hide a wrong name."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def assert_same_logits(ours, theirs, state, tokens_BT):
    """Load `state` (every key of it, and no other) into ours, and compare."""
    for name, rows in (
        ("embedding.weight", ours.embedding.weight),
        ("head.weight", getattr(ours.head, "weight", None)),
    ):
        if rows is not None:
            state[name] = torch.cat((state[name], torch.zeros(len(rows) - len(state[name]), rows.shape[1])))
    ours.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT).logits
        actual_BTV = ours(tokens_BT)
    assert expected_BTV.std() > 0.1
    torch.testing.assert_close(actual_BTV, expected_BTV, atol=1e-5, rtol=1e-5)


def rename(state, names):
    """Their names → ours; a weight tied to the embedding is left out."""
    renamed = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        name = name.removeprefix("model.")
        renamed["final_norm.weight" if name == "norm.weight" else name] = value
    return renamed


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_gpt2(tiny, build, batch, attention):
    config = tiny(tie_weights=True, attention=attention)
    theirs = randomise(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_positions=12, n_embd=24, n_layer=2, n_head=4, n_inner=40)
        )
    )
    state = {
        "embedding.weight": theirs.transformer.wte.weight,
        "position_embedding.weight": theirs.transformer.wpe.weight,
        "final_norm.weight": theirs.transformer.ln_f.weight,
        "final_norm.bias": theirs.transformer.ln_f.bias,
    }
    for index, block in enumerate(theirs.transformer.h):
        for leaf, split in (("weight", 1), ("bias", 0)):
            parts = getattr(block.attn.c_attn, leaf).chunk(3, dim=split)
            matrices = dict(zip(("attention.query", "attention.key", "attention.value"), parts, strict=True))
            matrices["attention.output"] = getattr(block.attn.c_proj, leaf)
            matrices["feed_forward.up"] = getattr(block.mlp.c_fc, leaf)
            matrices["feed_forward.down"] = getattr(block.mlp.c_proj, leaf)
            state |= {f"blocks.{index}.{name}.{leaf}": value.T if split else value for name, value in matrices.items()}
            state[f"blocks.{index}.attention_norm.{leaf}"] = getattr(block.ln_1, leaf)
            state[f"blocks.{index}.feed_forward_norm.{leaf}"] = getattr(block.ln_2, leaf)
    assert_same_logits(build(config), theirs, state, batch(config)[0])


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(tiny, build, batch, attention, tied):
    config = tiny(**MODERN, num_kv_heads=2, norm_eps=1e-6, rope_theta=500.0, tie_weights=tied, attention=attention)
    theirs = randomise(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SHARED,
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                tie_word_embeddings=tied,
            )
        )
    )
    state = rename(theirs.state_dict(), LLAMA_NAMES | LLAMA_NORMS)
    if tied:
        del state["head.weight"]
    assert_same_logits(build(config), theirs, state, batch(config)[0])


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_qwen3(tiny, build, batch, attention):
    changes = {"num_kv_heads": 2, "head_dim": 10, "norm_eps": 1e-6, "qk_norm": True, "tie_weights": True}
    config = tiny(**MODERN, **changes, attention=attention)
    theirs = randomise(
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=10, tie_word_embeddings=True)
        )
    )
    state = rename(theirs.state_dict(), LLAMA_NAMES | LLAMA_NORMS)
    del state["head.weight"]
    assert_same_logits(build(config), theirs, state, batch(config)[0])


def test_gemma2(tiny, build, batch):
    """Caps near the sizes of scores and logits, so that leaving one out shows."""
    config = tiny(
        norm="rmsnorm_zero_centered",
        norm_eps=1e-6,
        positions="rotary",
        gated=True,
        bias=False,
        post_norm=True,
        num_kv_heads=2,
        head_dim=10,
        query_scale=0.25,
        attention="reference",
        attention_softcap=0.7,
        logit_softcap=1.5,
        scale_embeddings=True,
        tie_weights=True,
    )
    theirs = randomise(
        transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **SHARED,
                num_key_value_heads=2,
                head_dim=10,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=0.7,
                final_logit_softcapping=1.5,
                attn_implementation="eager",
            )
        )
    )
    state = rename(theirs.state_dict(), LLAMA_NAMES | GEMMA_NORMS)
    del state["head.weight"]
    assert_same_logits(build(config), theirs, state, batch(config)[0])
