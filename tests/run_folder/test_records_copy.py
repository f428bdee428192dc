"""Records beside the checkpoints: a run that goes on on another machine has the metrics of all its steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.run_folder.records_copy import RecordsCopy, records_copy
from pretrain_xla.run_folder.trackers import Row
from pretrain_xla.train.run import run

STEPS = 6


def rows(folder: Path) -> list[Row]:
    """What a run has logged of its steps."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in found if "loss" in row]


def of(make_config: Callable[..., RunConfig], tmp_path: Path, machine: str, steps: int, **more: Any) -> RunConfig:
    bucket = f"file://{tmp_path}/bucket/checkpoints"
    return make_config(
        checkpoint={"checkpoints_dir": bucket, "save_interval": 2},
        logging={"run_dir": str(tmp_path / machine), "log_interval": 1, "tensorboard": True} | more,
        train={"train_steps": steps, "valid_interval": 100},
    )


def test_a_run_goes_on_on_another_machine(
    make_config: Callable[..., RunConfig],
    tokens: Path,
    tmp_path: Path,
) -> None:
    run(of(make_config, tmp_path, "first", STEPS))
    whole = rows(tmp_path / "first")
    assert [row["step"] for row in whole] == [*range(1, STEPS + 1)]
    records = tmp_path / "bucket" / "checkpoints" / "records"
    assert rows(records) == whole
    assert {"summary.json", "loss.png", "config.yaml"} <= {path.name for path in records.iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in records.iterdir())
    # A machine is lost between two checkpoints: the copy has what the last complete one needs.
    shutil.rmtree(tmp_path / "bucket")
    shutil.rmtree(tmp_path / "first")
    run(of(make_config, tmp_path, "second", 4))
    shutil.rmtree(tmp_path / "second")
    (records / "summary.json").unlink()
    run(of(make_config, tmp_path, "third", STEPS))
    assert rows(tmp_path / "third") == whole
    assert rows(records) == whole


def test_what_is_here_already_is_kept_unless_it_lacks_steps(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here, there = tmp_path / "here" / "metrics.jsonl", tmp_path / "bucket" / "records" / "metrics.jsonl"
    copy = RecordsCopy(str(tmp_path / "here"), f"file://{tmp_path}/bucket", pytest.fail)
    copy.fetch(3)  # nothing is there
    here.write_text('{"step": 3, "loss": 1.0}\n')
    (tmp_path / "here" / "notes.txt").write_text("of the user")
    copy.send()
    assert [path.name for path in there.parent.iterdir()] == ["metrics.jsonl"]
    there.write_text('{"step": 5, "loss": 2.0}\n')
    copy.send()  # it has not changed here
    copy.fetch(3)
    assert '"step": 3' in here.read_text()
    copy.fetch(0)
    copy.fetch(5)
    assert '"step": 5' in here.read_text()
    # Names lead nowhere else.
    (there.parent / "events.out.tfevents.1" / "deep").mkdir(parents=True)
    (there.parent / "events.out.tfevents.1" / "deep" / "file").write_text("x")
    copy.fetch(5)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["metrics.jsonl", "notes.txt"]


def test_what_cannot_be_copied_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "summary.json").write_text("{}")
    (tmp_path / "bucket").write_text("a file where a folder should be")
    said: list[str] = []
    copy = RecordsCopy(str(tmp_path / "here"), f"file://{tmp_path}/bucket", said.append)
    copy.send()
    assert len(said) == 1
    assert "summary.json could not be copied to file://" in said[0]


def test_only_where_the_checkpoints_are_elsewhere(make_config: Callable[..., RunConfig]) -> None:
    assert records_copy(make_config(), pytest.fail) is None
