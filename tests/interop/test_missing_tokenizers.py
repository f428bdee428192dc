"""A model that comes without a tokenizer, with one that cannot be loaded, or with one that its shards do not name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from pretrain_xla.config import build_config
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.interop.from_checkpoint import resolve_tokenizer
from pretrain_xla.interop.load import load_model
from pretrain_xla.tokenizers.train import train_tokenizer

from .test_load import TINY, save_run

SHAPE = {"n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 4}


def save(folder: Path, vocab_size: int = 300) -> Path:
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **SHAPE)).save_pretrained(folder)
    return folder


def tokenizer_in(folder: Path) -> Path:
    train_tokenizer(["abc " * 9], 260, str(folder), min_frequency=1)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("vocab_size", [300, 50300])
def test_without_a_tokenizer_there_is_none_through_import_and_export(
    vocab_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    import_command([str(save(tmp_path / "folder", vocab_size)), str(run)])
    assert load_model(str(run)).tokenizer is None
    export_command([str(run), str(out)])
    assert "this model came without a tokenizer" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None


def test_a_tokenizer_larger_than_the_model_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config({"model": TINY | {"vocab_size": 99}, "data": {"tokenizer": "bytes"}}, "test")
    save_run(tmp_path / "run", config, {1: 1.0})
    export_command([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "note: tokenizer 'bytes' has 257 tokens and the model 99: it is not the model's" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_training_takes_the_checkpoints_where_the_shards_name_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "folder")
    tree = {"train": {"from_checkpoint": str(folder)}, "data": {"train_dir": str(tmp_path / "raw")}}
    config = build_config(tree, "test")
    (note,) = resolve_tokenizer(config, frozenset())[1]
    assert note == f"neither {folder} nor the shards name a tokenizer: gpt2 is taken for text"
    own = tokenizer_in(folder)
    adopted, notes = resolve_tokenizer(config, frozenset())
    assert adopted.data.tokenizer == str(own)
    assert notes == [f"the shards name no tokenizer: that of {folder} is taken"]
    assert resolve_tokenizer(config, frozenset({"tokenizer"})) == (config, [])


def test_one_without_an_end_of_text_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "folder")
    own = tokenizer_in(folder)
    own.write_text(own.read_text().replace("<|endoftext|>", "<|nothing|>"))
    import_command([str(folder), str(tmp_path / "run")])
    assert "note: its tokenizer is left out: tokenizer" in capsys.readouterr().out
    assert load_model(str(tmp_path / "run")).tokenizer is None
