"""One run in a folder at a time, with real locks and a real second process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.folders import local_folders
from pretrain_xla.run_folder.lock import LOCK, alone_in
from pretrain_xla.train.run import run

Make = Callable[..., RunConfig]
HOLD = """
import sys
from pretrain_xla.run_folder.lock import alone_in
with alone_in({"run_dir": sys.argv[1], "checkpoints_dir": sys.argv[2]}):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_second_run_is_refused_and_a_crash_frees_the_folder(make_config: Make, tmp_path: Path) -> None:
    checkpoints = tmp_path / "elsewhere"
    config = make_config(checkpoint={"checkpoints_dir": str(checkpoints)})
    folders = local_folders(config)
    for folder in folders.values():
        Path(folder).mkdir()
    command = [sys.executable, "-c", HOLD, *folders.values()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        holder = f"process {other.pid} on {os.uname().nodename}"
        with pytest.raises(UserError) as caught:
            run(config)
        assert str(caught.value) == (
            f"run_dir={config.run_dir} is in use by another run ({holder}): wait until it has ended, or name another folder"
        )
        another = make_config(
            checkpoint={"checkpoints_dir": str(checkpoints)}, logging={"run_dir": str(tmp_path / "b")}
        )
        with pytest.raises(UserError, match=f"checkpoints_dir={checkpoints} is in use by another run"):
            run(another)
        assert not (tmp_path / "b").exists()
        run(config.model_copy(update={"train": config.train.model_copy(update={"mode": "evaluate"})}))  # reads only
        os.kill(other.pid, signal.SIGKILL)
    assert (checkpoints / LOCK).exists(), "what a crash leaves behind"
    run(config)
    assert not list(tmp_path.rglob(LOCK))


def test_a_folder_that_is_named_twice_is_locked_once(tmp_path: Path) -> None:
    with alone_in({"run_dir": str(tmp_path), "checkpoints_dir": f"{tmp_path}/."}):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(UserError, match="in use"), alone_in({"run_dir": str(tmp_path)}):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_between_opening_and_locking_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, raced = os.stat, list[str]()

    def removed(path: str, **options: Any) -> os.stat_result:
        if not raced and path == str(tmp_path / LOCK):
            raced.append(path)
            os.unlink(path)
            Path(path).touch()  # a third process
        return stat(path, **options)

    monkeypatch.setattr("pretrain_xla.run_folder.lock.os.stat", removed)
    with alone_in({"run_dir": str(tmp_path)}):
        assert len(raced) == 1
        with pytest.raises(UserError, match="in use"), alone_in({"run_dir": str(tmp_path)}):
            raise AssertionError
