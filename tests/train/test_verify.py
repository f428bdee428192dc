"""`verify`: a run's own steps replay bit for bit, and one number that differs is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.train.run import run
from pretrain_xla.train.verify import verify_command

Make = Callable[..., RunConfig]


@pytest.fixture
def folder(make_config: Make, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with everything that a step may depend on."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    run(
        make_config(
            model={"dropout": 0.1},
            optim={"optim_type": "muon", "muon_row_beta": 0.9},
            train={"train_steps": 12, "gradient_accum_step": 2, "train_batch_size": 2, "valid_interval": 5},
            checkpoint={"save_interval": 5},
            logging={"log_interval": 3, "run_dir": str(tmp_path / "run"), "tensorboard": False},
        )
    )
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(folder: Path, step: int, **values: Any) -> None:
    """Change the row of a step in a run's metrics."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [row | values if row["step"] == step and "loss" in row else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))


def test_a_run_replays_bit_for_bit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    same = "losses and gradient norms are bit for bit those that were logged"
    for words, steps in (
        (["--steps", "7"], "6 to 12"),  # from the newest checkpoint with seven steps behind it
        (["--steps", "99"], "1 to 12"),
        (["--from-step", "10"], "11 to 12"),
        (["--from-step", "0", "--steps", "4"], "1 to 4"),
    ):
        assert verify_command([str(folder), *words]) == 0
        assert f"{folder}: steps {steps}: {same}" in capsys.readouterr().out
    assert tree(folder) == before, "nothing is written"
    moved = folder.rename(tmp_path / "moved")
    assert verify_command([str(moved), "--steps", "2"]) == 0
    assert f"{moved}: steps 11 to 12: {same}" in capsys.readouterr().out
    # What cannot be compared is an error of one line.
    for words, expected in (
        ([str(tmp_path)], "no config.yaml there: name the folder of a run"),
        ([str(moved), "--from-step", "7"], r"no complete checkpoint of that step: choose among 0, 5, 10, 12"),
        ([str(moved), "--from-step", "12"], "has no step that follows step 12: there is nothing to compare"),
        ([str(moved), "--steps", "0"], "--steps 0: give at least 1"),
        ([str(moved), "--stepz", "3"], "unknown argument '--stepz'"),
    ):
        with pytest.raises(UserError, match=expected):
            verify_command(words)
    (moved / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file, so there is nothing to compare with"):
        verify_command([str(moved)])


def test_it_says_where_they_part(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "metrics.jsonl"
    row = next(row for row in map(json.loads, path.read_text().splitlines()) if row["step"] == 8)
    other = float(np.nextafter(np.float32(row["loss"]), np.float32(0)))  # one bit
    change(folder, 8, loss=other)
    assert verify_command([str(folder), "--from-step", "5"]) == 1
    expected = f"they part at step 8, whose loss was {other!r} and is {row['loss']!r} now; 1 of 7 steps differ"
    assert f"{folder}: steps 6 to 12: {expected}" in capsys.readouterr().out
    assert verify_command([str(folder), "--from-step", "10"]) == 0, "behind it"
    change(folder, 11, grad_norm=None)
    assert verify_command([str(folder), "--from-step", "10"]) == 1
    assert "they part at step 11, whose gradient norm was nan and is " in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"mesh": {"data": 4}}))
    # Other data at the same place.
    shard = tmp_path / "data" / "train" / "000.npy"
    data = np.load(shard)
    np.save(shard, (data + 1) % 37)
    assert verify_command([str(folder), "--from-step", "0"]) == 1
    printed = capsys.readouterr().out
    assert "they part at step 1, whose loss was " in printed
    assert "note: the run's mesh was {'data': 4}, and here it is {'data': 1}: its numbers may differ" in printed


def test_steps_that_were_skipped_are_the_same_if_they_are_skipped_again() -> None:
    from pretrain_xla.train.verify import _same

    assert _same({"loss": math.nan}, {"loss": math.nan}, "loss")
    assert _same({"loss": math.inf}, {"loss": math.nan}, "loss"), "both are null in the file"
    assert not _same({"loss": 1.0}, {"loss": math.nan}, "loss")
    assert not _same({"loss": math.nan}, {"loss": 1.0}, "loss")
