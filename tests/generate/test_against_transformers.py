"""The same greedy tokens as `transformers`' own generate, from the same weights: one architecture for each way of attending."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pretrain_xla.config import build_config
from pretrain_xla.generate.continuation import Continuation, Request
from pretrain_xla.generate.decoder import Decoder
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.interop.layouts import GPT2_LAYOUT
from pretrain_xla.interop.tensors import to_ours
from pretrain_xla.model import GPT
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from tests.model.test_against_transformers import GEMMA_NORMS, LLAMA_NAMES, LLAMA_NORMS, SHARED, randomise, rename

LENGTH, NEW = 40, 30
SIZES = {"vocab_size": 61, "vocab_multiple": 16, "seq_length": LENGTH, "d_model": 24, "num_layers": 2, "num_heads": 4}
MODERN = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "positions": "rotary",
    "gated": True,
    "activation": "silu",
    "bias": False,
}
THEIRS = SHARED | {"max_position_embeddings": LENGTH, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2() -> tuple[Any, dict[str, Any]]:
    sizes = {"vocab_size": 61, "n_positions": LENGTH, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config), {"tie_weights": True}


def llama() -> tuple[Any, dict[str, Any]]:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**THEIRS, num_key_value_heads=2))
    return model, MODERN | {"num_kv_heads": 2}


def qwen3() -> tuple[Any, dict[str, Any]]:
    config = transformers.Qwen3Config(**THEIRS, num_key_value_heads=1, head_dim=10, tie_word_embeddings=True)
    changes = {"num_kv_heads": 1, "head_dim": 10, "qk_norm": True, "tie_weights": True}
    return transformers.Qwen3ForCausalLM(config), MODERN | changes


def gemma2() -> tuple[Any, dict[str, Any]]:
    config = transformers.Gemma2Config(
        **THEIRS,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=0.7,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
    )
    changes: dict[str, Any] = {"norm": "rmsnorm_zero_centered", "activation": "gelu", "post_norm": True}
    changes |= {"num_kv_heads": 2, "head_dim": 10, "query_scale": 0.25, "attention_softcap": 0.7, "logit_softcap": 30.0}
    return transformers.Gemma2ForCausalLM(config), MODERN | changes | {"scale_embeddings": True, "tie_weights": True}


@pytest.mark.parametrize("make", [gpt2, llama, qwen3, gemma2])
def test_greedy(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    transformers.set_seed(1)
    theirs, changes = make()
    randomise(theirs)
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2)  # clear preferences, or two tokens would follow each other for ever
    tree = {"model": SIZES | {"d_ff": 40, **changes}, "parallel": {"runtime": "torch", "device": "cpu"}}
    config = build_config(tree, "test")
    state = theirs.state_dict()
    if make is gpt2:
        tensors = to_ours(state, config.model, GPT2_LAYOUT, "transformers")
    else:
        tensors = rename(state, LLAMA_NAMES | (GEMMA_NORMS if make is gemma2 else LLAMA_NORMS))
        for name in ("embedding.weight", "head.weight"):
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 3))
        if config.model.tie_weights:
            del tensors["head.weight"]
    model = GPT(config.model)
    model.load_state_dict(tensors, strict=True)
    runtime = TorchRuntime(config)
    texts = [[5, 9, 60, 2, 33, 7, 21, 3, 40, 11], [1, 2, 3], [50]]
    rows: list[list[int]] = [[] for _ in texts]
    for row, token in Continuation(Decoder(model.eval(), runtime), texts, Request(NEW, Sampling(temperature=0))):
        rows[row].append(token)
    runtime.close()
    for text, row in zip(texts, rows, strict=True):
        ids = torch.tensor([text])
        mask = torch.ones_like(ids)
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert row == expected[0, len(text) :].tolist()
    assert len({token for row in rows for token in row}) > 2
