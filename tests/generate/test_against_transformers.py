"""The same greedy tokens as `transformers`' own generate, from the same weights: one architecture for each way of attending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretrain_xla.config import build_config
from pretrain_xla.generate.continuation import Continuation, Request
from pretrain_xla.generate.decoder import Decoder
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT
from pretrain_xla.runtime.torch_runtime import TorchRuntime

LENGTH, NEW = 40, 30
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SIZES |= {"max_position_embeddings": LENGTH, **NONE}


def gpt2() -> Any:
    sizes = {"vocab_size": 61, "n_positions": LENGTH, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **NONE))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def qwen3() -> Any:
    changes = {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **changes))


def gemma2() -> Any:
    """With a score cap that bites."""
    changes = {"num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.7}
    config = transformers.Gemma2Config(**SIZES, **changes, attn_implementation="eager")
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, llama, qwen3, gemma2])
def test_greedy(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    transformers.set_seed(1)
    theirs = make().eval()
    for parameter in theirs.parameters():
        parameter.data.add_(
            0.4 * torch.randn(parameter.shape)
        )  # clear preferences, and norms that are not the identity
    theirs.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    model = GPT(loaded.config)
    model.load_state_dict(loaded.tensors, strict=True)
    tree = {"model": loaded.config.model_dump(), "parallel": {"runtime": "torch", "device": "cpu"}}
    runtime = TorchRuntime(build_config(tree, "test"))
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
