"""Config and tokenizer in a run's folder, its write checks, and a small run in this process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.files import find_tokenizer, write_run_files
from pretrain_xla.run_folder.folders import writable_folders
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from pretrain_xla.train.run import run

Make = Callable[..., RunConfig]


def test_the_config_is_kept_and_is_enough_to_repeat_the_run(make_config: Make, tmp_path: Path) -> None:
    config = make_config(logging={"wandb_notes": "null"}, data={"tokenizer": "bytes"})
    (tmp_path / "run").mkdir()
    write_run_files(config)
    path = str(tmp_path / "run" / "config.yaml")
    assert build_config(load_yaml(path), path) == config
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.yaml"], (
        "a tokenizer known by name is not copied"
    )
    assert find_tokenizer(config.checkpoints_dir) is None


def test_folders_are_created_and_stay_empty(make_config: Make, tmp_path: Path) -> None:
    with writable_folders(make_config()):
        pass
    assert [entry.relative_to(tmp_path) for entry in (tmp_path / "run").rglob("*")] == [Path("run/checkpoints")]


@pytest.mark.parametrize("key", ["run_dir", "checkpoints_dir"])
def test_a_folder_that_cannot_be_written_is_named(key: str, make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / "file" / "x")
    config = make_config(**({"logging": {key: folder}} if key == "run_dir" else {"checkpoint": {key: folder}}))
    with pytest.raises(UserError) as caught, writable_folders(config):
        pass
    assert str(caught.value) == f"{key}={folder} cannot be written (Not a directory): name another folder"


@pytest.mark.usefixtures("tokens", "runtime")
def test_checkpoints_may_be_outside_the_run_folder(make_config: Make, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    run(make_config(checkpoint={"checkpoints_dir": url}))
    assert CheckpointStore(url, 1).steps() == [2]
    assert {"config.yaml", "metrics.jsonl", "summary.json", "loss.png"} <= {
        entry.name for entry in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize("named_by", ["tokenizer.json", "its folder"])
def test_the_users_own_tokenizer_is_copied_to_the_run(named_by: str, make_config: Make, tmp_path: Path) -> None:
    folder = str(tmp_path / "vocabulary")
    trained = train_tokenizer(["some text, and some more text"] * 3, 300, folder)
    config = make_config(data={"tokenizer": f"{folder}/tokenizer.json" if named_by == "tokenizer.json" else folder})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_run_files(config)
    kept = find_tokenizer(config.checkpoints_dir)
    assert kept == str(tmp_path / "run" / "tokenizer" / "tokenizer.json")
    copy = load_tokenizer(kept)
    assert copy.encode("some more text") == trained.encode("some more text")
    assert (copy.vocab_size, copy.end_of_text) == (trained.vocab_size, trained.end_of_text)


def test_many_processes_may_try_the_same_folder_at_once(make_config: Make) -> None:
    config = make_config()

    def try_folders() -> None:
        with writable_folders(config):
            pass

    with ThreadPoolExecutor(8) as pool:
        for attempt in [pool.submit(try_folders) for _ in range(800)]:
            attempt.result()
    assert os.listdir(config.run_dir or "") == ["checkpoints"], "and no test file is left"


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_start_that_is_refused_leaves_no_folder(make_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    nothing = make_config(
        logging={"run_dir": str(folder)},
        data={"train_dir": str(tmp_path / "nothing"), "valid_dir": str(tmp_path / "nothing")},
    )
    with pytest.raises(UserError, match="no such folder"):
        run(nothing)
    assert not (tmp_path / "some").exists()
    folder.mkdir(parents=True)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="no such folder"):
        run(nothing)
    assert [path.name for path in folder.iterdir()] == ["note.txt"]
