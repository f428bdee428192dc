"""`make train` with few steps: on Python's own documentation, and on the user's text."""

import json
import re
import typing
from pathlib import Path

import pytest

from pretrain_xla.command_line import flags_of
from pretrain_xla.errors import UserError
from pretrain_xla.quickstart import QuickstartFlags, quickstart_command

from .conftest import run, summary

OUTPUTS = {"config.yaml", "metrics.jsonl", "summary.json", "loss.png", "sample.txt", "checkpoints", "tokenizer"}


def test_quickstart_writes_all_outputs(tmp_path: Path) -> None:
    done = run("-m", "pretrain_xla", "quickstart", "--train-steps", "6", "--prompt", "The", cwd=tmp_path, fresh=True)
    assert done.status == 0, done.errors
    run_dir = tmp_path / "runs" / "quickstart"
    names = {path.name for path in run_dir.iterdir()}
    assert names >= OUTPUTS
    assert any(name.startswith("events.out.tfevents") for name in names)
    counts = summary(run_dir)
    assert counts["graphs"] == {"train": 1, "validation": 1, "other": 0}
    assert counts["recompilations"] == counts["unplanned_host_transfers"] == 0
    assert counts["last_valid_loss"] < counts["first_valid_loss"]
    assert (run_dir / "sample.txt").read_text().startswith("The")
    assert (run_dir / "loss.png").stat().st_size > 10_000
    info = json.loads((tmp_path / "data" / "quickstart" / "dataset.json").read_text())
    assert info["splits"]["train"]["tokens"] > 500_000


def test_own_text(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    lines = ({"text": " ".join(words[(i * k + k) % 7] for k in range(200)) + f" end of story {i}."} for i in range(300))
    (tmp_path / "my text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("-m", "pretrain_xla", "quickstart", "--corpus", "my text.jsonl", "--train-steps", "4", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert (tmp_path / "runs" / "own-my-text" / "sample.txt").exists()


def test_errors_name_existing_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"body": "a b c"}\n' * 9)
    for arguments, expected in [
        (["--corpus", "nowhere"], "nowhere: no such file"),
        (["--corpus", "text.jsonl"], "--text-column"),
        (["--corpus", "text.jsonl", "--text-column", "body", "--valid-fraction", "1e-9"], "valid_fraction"),
    ]:
        with pytest.raises(UserError) as caught:
            quickstart_command(arguments)
        assert expected in str(caught.value)
        named = set(re.findall(r"--[a-z-]+", str(caught.value)))
        assert named <= {flag for leaf in typing.get_type_hints(QuickstartFlags) for flag in flags_of(leaf)}
        assert not (tmp_path / "data").exists()
