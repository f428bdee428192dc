"""Options that old checkpoints do not state, and settings pickled as objects of classes that are not installed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.interop.command import import_command
from pretrain_xla.interop.inferred import infer_heads
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT

from .conftest import build, tiny, tokens
from .test_old_checkpoints import nano


def saved_by(module: str, name: str, values: dict[str, Any], path: Path, state: dict[str, Any]) -> None:
    """A checkpoint with an object of a class that is only there while it is written."""
    kind = dataclasses.make_dataclass(name, values)
    kind.__module__ = module
    owner = sys.modules.setdefault(module, type(sys)(module))
    setattr(owner, name, kind)
    torch.save({"model": state, "config": kind(**values), "step": 3}, path)
    delattr(owner, name)


def same_logits(path: Path, model: GPT) -> None:
    loaded = load_model(str(path))
    ours = GPT(loaded.config)
    ours.load_state_dict(loaded.tensors, strict=True)
    ids_BT = tokens(61, 12)
    assert torch.equal(ours.eval()(ids_BT), model(ids_BT))


@pytest.mark.parametrize("module", ["__main__", "model"])
def test_build_nanogpts_pickled_settings_are_read_as_plain_values(module: str, tmp_path: Path) -> None:
    model = build(tiny(d_model=48, num_heads=3, tie_weights=True, activation="gelu"))
    values = {"block_size": 12, "vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 48}
    saved_by(module, "GPTConfig", values, tmp_path / "model_19072.pt", nano(model))
    same_logits(tmp_path / "model_19072.pt", model)
    (note,) = load_model(str(tmp_path / "model_19072.pt")).notes
    assert "it does not say which GELU" in note
    assert "the tanh form is taken" in note
    assert "build-nanogpt" in note


@pytest.mark.parametrize(
    ("saved", "activation", "guessed"),
    [
        ({"args": argparse.Namespace(n_head=4, lr=0.1)}, "gelu_exact", True),
        ({"hyper_parameters": {"config": {"n_heads": 4}}}, "gelu_exact", True),
        ({"model_args": {"n_head": 4, "n_layer": 2, "bias": True}}, "gelu_exact", True),
        ({"model_args": {"n_head": 4, "n_layer": 2, "block_size": 12}}, "gelu", True),
        ({"config": {"n_head": 4, "activation_function": "gelu_new"}}, "gelu", False),
        ({"config": {"n_head": 4, "activation_function": "gelu"}}, "gelu_exact", False),
        ({"config": {"n_head": 4, "activation": "relu"}}, "relu", False),
    ],
)
def test_settings_in_whatever_form(saved: dict[str, Any], activation: str, guessed: bool, tmp_path: Path) -> None:
    model = build(tiny(tie_weights=True, activation=activation))
    torch.save({"model": nano(model)} | saved, tmp_path / "ckpt.pt")
    same_logits(tmp_path / "ckpt.pt", model)
    assert [note for note in load_model(str(tmp_path / "ckpt.pt")).notes if "which GELU" in note] != [] or not guessed


def test_saved_masks_show_the_tanh_form(tmp_path: Path) -> None:
    model = build(tiny(activation="gelu"))  # a head of its own, as minGPT
    state = nano(model, masked=True) | {"lm_head.weight": model.head.weight[:61].detach().clone()}  # type: ignore[union-attr]
    torch.save({"model": state, "config": {"n_head": 4}}, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    same_logits(tmp_path / "ckpt.pt", model)
    assert "as by minGPT" in load_model(str(tmp_path / "ckpt.pt")).notes[0]


def test_settings_as_an_object_in_a_file_of_torch_before_1_6(tmp_path: Path) -> None:
    model = build(tiny(tie_weights=True, activation="relu"))
    saved = {"model": nano(model), "args": argparse.Namespace(n_head=4, activation="relu")}
    torch.save(saved, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    same_logits(tmp_path / "ckpt.pt", model)


def test_an_unknown_number_of_heads_is_refused_and_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(tiny(d_model=48, num_heads=3, tie_weights=True, activation="gelu_exact"))
    path = str(tmp_path / "ckpt.pt")
    torch.save(nano(model), path)
    for command in (
        lambda: load_model(path),
        lambda: import_command([path, str(tmp_path / "run")]),
        lambda: evaluate_command(["--model", path, "--tasks", "text=x"]),
    ):
        with pytest.raises(UserError, match=r"ckpt.pt: it does not say how many heads .* with --num-heads .*width, 48"):
            command()
    import_command([path, str(tmp_path / "run"), "--num-heads", "3"])
    said = capsys.readouterr().out
    assert "ckpt.pt: it does not say which GELU it was trained with: the exact form is taken" in said
    same_logits(tmp_path / "run", model)


def test_only_a_published_gpt2_has_its_heads_inferred() -> None:
    with torch.device("meta"):
        published = {
            "transformer.wte.weight": torch.empty(50257, 1024),
            "transformer.wpe.weight": torch.empty(1024, 1024),
        }
        published |= {f"transformer.h.{layer}.ln_1.weight": torch.empty(1024) for layer in range(24)}
        heads, note = infer_heads(published, {}, {}, "x.pt")
        assert heads == 16
        assert note is not None
        assert "16 are taken" in note
        assert infer_heads(published, {}, {"num_heads": 8}, "x.pt") == (8, None)
        del published["transformer.h.23.ln_1.weight"]
        with pytest.raises(UserError, match="how many heads"):
            infer_heads(published, {}, {}, "x.pt")
