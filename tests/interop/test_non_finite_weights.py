"""Weights that hold NaN or infinity are refused: each entry point names the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pretrain_xla import cli
from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.generate.command import generate_command
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.run_folder import checkpoint
from pretrain_xla.run_folder.checkpoint import CheckpointStore

from .test_load import TINY, save_run

HERE = ["--runtime", "torch", "--device", "cpu"]
MODEL = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def pretrain(*words: str) -> None:
    flags = ["--train-dir", "data", "--valid-dir", "data", "--train-steps", "9", "--run-dir", "run", "--no-tensorboard"]
    cli.pretrain([*flags, *words], program="run_pretrain.py", fixed={"runtime": "torch", "device": "cpu"})


ENTRY_POINTS: dict[str, Callable[[], None]] = {
    "generate": lambda: generate_command(["--model", "run", "--prompt", "a", *HERE]),
    "evaluate": lambda: evaluate_command(["--model", "run", "--tasks", "text=text.txt", *HERE]),
    "export": lambda: export_command(["run", "out"]),
    "import": lambda: import_command(["theirs", "out"]),
    "resume": lambda: pretrain(*MODEL, "--d-ff", "32"),
    "do_test": lambda: pretrain("--from-checkpoint", "run", "--do-test"),
    "from_checkpoint": lambda: pretrain("--from-checkpoint", "theirs", "--run-dir", "other"),
}


def test_every_entry_point_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    save_run(tmp_path / "whole", config, {3: 1.0})
    export_command(["whole", "theirs"])
    weights = safetensors.torch.load_file("theirs/model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.input_layernorm.weight") or "h.1.ln_1" in name)
    weights[name][2] = torch.nan
    safetensors.torch.save_file(weights, "theirs/model.safetensors", metadata={"format": "pt"})
    with monkeypatch.context() as before:  # as a version that did not look would have saved it
        before.setattr(checkpoint, "not_finite", lambda tensors: None)
        whole, store = (CheckpointStore(f"{run}/checkpoints", limit=1) for run in ("whole", "run"))
        tensors = whole.load(3)
        for name, tensor in list(tensors.items()):  # complete, so that a resume comes to its values
            for moment in ("first", "second"):
                tensors[name.replace("model.", f"optimizer.{moment}_moment.")] = torch.zeros_like(tensor)
        tensors["optimizer.step"] = torch.tensor(3, dtype=torch.int32)
        tensors["model.final_norm.weight"][5] = torch.inf
        store.save(tensors, whole.info(3))
        store.close()
    (tmp_path / "data").mkdir()
    np.save("data/0.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    for entry_point, enter in ENTRY_POINTS.items():
        capsys.readouterr()
        with pytest.raises((UserError, SystemExit)) as caught:
            enter()
        said = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
        assert "holds NaN or infinity in" in said, entry_point
        assert "norm" in said.split(" holds ")[0], (entry_point, said)
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2
    assert not list((tmp_path / "out").glob("*.safetensors"))
