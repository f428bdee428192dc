"""Models made by `transformers`, in every format in which it and other code have saved them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from pretrain_xla import cli
from pretrain_xla.errors import UserError
from pretrain_xla.interop.config_json import read_config
from pretrain_xla.interop.from_checkpoint import fit_tensors, resolve_architecture
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT, parameter_count

from .conftest import assert_same_logits, noise, tokens

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 10}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
GPT2 = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
MADE: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2, untied, other width, exact gelu": lambda: transformers.GPT2Config(
        **GPT2, n_inner=40, tie_word_embeddings=False, activation_function="gelu", layer_norm_epsilon=1e-3
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama, grouped, tied, biased, other base": lambda: transformers.LlamaConfig(
        **SHAPE, **GROUPED, **ROPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, biases in attention alone": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, **GROUPED, **ROPE),
    "qwen3, tied": lambda: transformers.Qwen3Config(**SHAPE, **GROUPED, tie_word_embeddings=True),
    "qwen2, biased queries": lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, **GROUPED),
    "gemma2, no window": lambda: transformers.Gemma2Config(
        **SHAPE, **GROUPED, query_pre_attn_scalar=7, layer_types=["full_attention"] * 2, attn_logit_softcapping=0.7
    ),
    "gemma2, window as long as the text, no caps": lambda: transformers.Gemma2Config(
        **SHAPE, **GROUPED, sliding_window=16, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma2, short window": lambda: transformers.Gemma2Config(**SHAPE, **GROUPED, sliding_window=9),
    "mistral, short window": lambda: transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=9),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return noise(transformers.AutoModelForCausalLM.from_config(MADE[name]()), size=0.1)


def load(path: Path) -> GPT:
    loaded = load_model(str(path))
    model = GPT(loaded.config)
    model.load_state_dict(loaded.tensors, strict=True)
    return model


@pytest.mark.parametrize("name", MADE)
def test_random_models_agree(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.seq_length == (9 if "short window" in name else 16)
    assert_same_logits(ours, theirs)


def test_in_shards(tmp_path: Path) -> None:
    theirs = make("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load(tmp_path), theirs)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"model-00.*is missing, which model.safetensors.index.json names"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("own_prefix", [True, False])
def test_pytorch_files_and_prefixes(prefix: str, own_prefix: bool, tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):
        theirs, folder = make(name), tmp_path / name
        theirs.config.save_pretrained(folder)
        state = theirs.state_dict()
        if not own_prefix:
            state = {n.removeprefix("transformer.").removeprefix("model."): t for n, t in state.items()}
        torch.save({prefix + n: t.clone() for n, t in state.items()}, folder / "pytorch_model.bin")
        assert_same_logits(load(folder), theirs)
        (folder / "pytorch_model.bin").rename(folder / "weights.pt")
        assert_same_logits(load(folder / "weights.pt"), theirs)


def test_a_pytorch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    make("gpt2").config.save_pretrained(tmp_path)
    torch.save({"transformer.wte.weight": Path("/")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="reading it would run code"):
        load(tmp_path)


@pytest.mark.parametrize("rows", [64, 128])
def test_padding_never_changes_a_loss(rows: int, tmp_path: Path) -> None:
    """Ours has rows of padding, of zeros, and with logits far below zero they would dominate if they counted."""
    theirs = make("gpt2, untied, other width, exact gelu")
    theirs.lm_head.weight.data -= 40 * theirs.transformer.ln_f.bias.detach() / theirs.transformer.ln_f.bias.norm() ** 2
    theirs.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    config = loaded.config.model_copy(update={"vocab_multiple": rows})
    ours = GPT(config)
    ours.load_state_dict(fit_tensors(loaded.tensors, config), strict=True)
    assert len(ours.embedding.weight) == rows
    ids = tokens(61, 16)
    with torch.no_grad():
        logits = theirs(ids).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert logits.mean() < -20
        torch.testing.assert_close(ours.eval()(ids[:, :-1], ids[:, 1:]), expected, atol=1e-5, rtol=1e-5)


def adopt(path: Path, stated: dict[str, Any]) -> Any:
    tree = {"model": stated, "train": {"from_checkpoint": str(path)}}
    return resolve_architecture(tree, frozenset(stated), "test")


def test_the_architecture_comes_from_the_checkpoint(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path)
    config, notes = adopt(tmp_path, {"dropout": 0.1})
    assert config.model == load_model(str(tmp_path)).config.model_copy(update={"dropout": 0.1})
    assert notes[0].startswith(f"the model is that of {tmp_path}")
    with pytest.raises(UserError, match=r"its num_layers is 2, this run's is 3; leave num_layers out"):
        adopt(tmp_path, {"num_layers": 3})


def test_flags_are_validated_with_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by the defaults, under which 32 would be no width for 12 heads, and id 9999 a token."""
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_embd": 32})).save_pretrained(tmp_path)
    words = ["--from-checkpoint", str(tmp_path), "--print-config", "--train-dir", str(tmp_path)]
    cli.main(["train", *words, "--d-model", "32", "--dropout", "0.1"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == load_model(str(tmp_path)).config.model_dump(mode="json") | {"dropout": 0.1}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *words, "--loss-ignore-tokens", "9999"])
    assert "loss_ignore_tokens=9999 is not below vocab_size=61" in capsys.readouterr().err


def test_trace_shows_the_checkpoints_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt2").save_pretrained(tmp_path)
    cli.main(["trace", "--from-checkpoint", str(tmp_path), "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert (tree["seq_length"], tree["model"]["parameters"]) == (16, parameter_count(load_model(str(tmp_path)).config))


def test_options_that_may_differ_from_the_checkpoint(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "learned")
    make("llama").save_pretrained(tmp_path / "rotary")
    assert adopt(tmp_path / "learned", {"seq_length": 9})[0].model.seq_length == 9
    with pytest.raises(UserError, match="its seq_length is 16, this run's is 17"):
        adopt(tmp_path / "learned", {"seq_length": 17})
    assert adopt(tmp_path / "rotary", {"seq_length": 17})[0].model.seq_length == 17
    config, notes = adopt(tmp_path / "learned", {"vocab_size": 64})
    assert config.model.vocab_size == 61
    assert notes[1] == "vocab_size 64 -> 61: the rest is padding"
    assert adopt(tmp_path / "learned", {"vocab_size": 60})[0].model.vocab_size == 60


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba' is not one that our model computes: gpt2, llama, qwen3"),
        ({"n_layer": None}, r"config.json: 'n_layer' is missing"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            r"scale_attn_by_inverse_layer_idx=True, and our model computes gpt2 only",
        ),
        ({"activation_function": "mish"}, r"activation 'mish' is none of ours"),
        ({"n_embd": 32}, r"'transformer.wte.weight' is 61 x 24, its config says 61 x 32"),
        ({"n_layer": 3}, r"tensor 'transformer.h.2.ln_1.weight' is missing"),
        ({"n_layer": 1}, r"tensor 'transformer.h.1.\S+' has no place"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | change))
    with pytest.raises(UserError, match=line):
        load(tmp_path)


def test_scaled_or_partial_rotary_positions_are_refused(tmp_path: Path) -> None:
    for rope in ({"rope_type": "llama3", "factor": 8.0}, {"rope_type": "default", "partial_rotary_factor": 0.5}):
        make("llama").save_pretrained(tmp_path)
        tree = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(tree | {"rope_parameters": rope}))
        with pytest.raises(UserError, match="our model turns all, unscaled"):
            load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"n_head": 0}, {"n_embd": "x"}, {"model_type": "smollm3", **SHAPE, "no_rope_layers": []}, {"n_layer": [2]}],
)
def test_invalid_values_are_one_line(change: dict[str, Any]) -> None:
    tree = {"model_type": "gpt2", **GPT2, "tie_word_embeddings": True} | change
    with pytest.raises(UserError, match=r"^test: ") as caught:
        read_config(tree, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    make("gpt2").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json: is not an index of shards"):
        load(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights there"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        load(tmp_path)
