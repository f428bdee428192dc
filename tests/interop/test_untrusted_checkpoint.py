"""An untrusted run folder runs no code, whichever entry point reads it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain_xla import cli
from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.generate.command import generate_command
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.storage.checked_json import parse_intact

from ..payload import Payload
from .hub_server import Hub
from .test_hub import files_of, hub, online  # noqa: F401 (fixtures)
from .test_load import TINY, save_run

HERE = ["--runtime", "torch", "--device", "cpu"]
MODEL = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def pretrain(*words: str) -> None:
    data = ["--train-dir", "data", "--valid-dir", "data", "--train-steps", "9", "--train-batch-size", "1"]
    cli.pretrain(
        [*data, "--no-tensorboard", *words], program="run_pretrain.py", fixed={"runtime": "torch", "device": "cpu"}
    )


ENTRY_POINTS: dict[str, Callable[[str], None]] = {
    "generate": lambda model: generate_command(["--model", model, "--prompt", "a", *HERE]),
    "evaluate": lambda model: evaluate_command(["--model", model, "--tasks", "text=text.txt", *HERE]),
    "export": lambda model: export_command([model, "out"]),
    "import": lambda model: import_command([model, "out"]),
    "from_checkpoint": lambda model: pretrain("--from-checkpoint", model, "--run-dir", "other"),
    "do_test": lambda model: pretrain("--from-checkpoint", model, "--do-test"),
    "resume": lambda _: pretrain("--run-dir", "theirs", *MODEL, "--d-ff", "32"),
    "resume from the Hub": lambda _: pretrain(
        "--run-dir", "other", "--hub-repo", "alice/theirs", *MODEL, "--d-ff", "32"
    ),
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: Hub) -> None:  # noqa: F811
    """A run here as `theirs` and on the Hub as `alice/theirs`, with a payload in it; and some data and text."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    save_run(tmp_path / "theirs", config, {3: 1.0})
    np.save("data.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "data").mkdir()
    shutil.move("data.npy", "data/0.npy")
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    folder = tmp_path / "theirs" / "checkpoints" / "step_00000003"
    # As before there was an index: only then is the pickle read.
    tree = parse_intact((folder / "checkpoint.json").read_bytes()) | {"version": 1}
    (folder / "checkpoint.json").write_text(json.dumps({name: tree[name] for name in tree.keys() - {"index", "code"}}))
    (folder / "index.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload("ran")))
    online.put("alice/theirs", files_of(tmp_path / "theirs"))


@pytest.mark.usefixtures("theirs")
def test_no_entry_point_runs_code_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for entry_point, enter in ENTRY_POINTS.items():
        for model in ("theirs",) if entry_point.startswith("resume") else ("theirs", "alice/theirs"):
            with pytest.raises((UserError, SystemExit)) as caught:
                enter(model)
            said = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
            assert "asks for posix.mkdir, which is not part of a checkpoint" in said, (entry_point, model)
            assert not (tmp_path / "ran").exists(), (entry_point, model)
