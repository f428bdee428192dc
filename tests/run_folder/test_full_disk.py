"""A full disk, simulated by `/dev/full` and a file size limit: what is refused, and what continues."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.appender import Appender
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.metrics import MetricLog, read_metrics
from pretrain_xla.train.run import run

Make = Callable[..., RunConfig]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of a file, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_until_there_is_room(tmp_path: Path) -> None:
    path, warnings = tmp_path / "rows", list[str]()
    appender = Appender(str(path), warnings.append)
    line = b"x" * 9999 + b"\n"
    with file_size_limit(30_005):
        for _ in range(5):
            appender.write(line)
        assert path.stat().st_size == 30_005
    assert warnings == [
        f"{path} cannot be written (File too large): the run continues and keeps the lines in memory until there is room"
    ]
    appender.write(b"last\n")
    assert path.read_bytes() == line * 5 + b"last\n"
    assert warnings[1:] == [f"{path} is written again, and no line is lost"]
    with file_size_limit(50_005):
        appender.write(b"a\nb\n")
        appender.close()
    assert warnings[-1] == f"{path}: the last 2 lines could not be written and are lost"


@pytest.mark.usefixtures("tokens", "runtime")
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_that_cannot_write_its_first_files_is_refused(name: str, make_config: Make, tmp_path: Path) -> None:
    run(make_config())
    before = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{name} cannot be written: No space left on device: free some space"):
        run(make_config(train={"train_steps": 3, "valid_steps": 1, "train_batch_size": 4, "eval_batch_size": 4}))
    assert (tmp_path / "run" / name).read_bytes() == before


@pytest.mark.usefixtures("tokens", "runtime")
@pytest.mark.parametrize("name", ["loss.png", "summary.json"])
def test_a_report_that_could_not_be_written_is_written_by_the_next_start(
    name: str, make_config: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{name} cannot be written: No space left on device: free some space"):
        run(make_config())
    assert CheckpointStore(str(folder / "checkpoints"), 1).steps() == [2]
    run(make_config())
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert (folder / "loss.png").stat().st_size > 10_000


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_disk_that_fills_up_costs_neither_the_run_nor_a_row(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write, full = MetricLog.write, list[int]()

    def fill(log: MetricLog, rows: list[dict[str, float]], *, kind: str) -> None:
        if rows[-1]["step"] == 3 and kind == "train":
            full.append(log._file._descriptor)
            log._file._descriptor = os.open("/dev/full", os.O_WRONLY)
        elif rows[-1]["step"] == 5 and full:
            os.close(log._file._descriptor)
            log._file._descriptor = full.pop()
        write(log, rows, kind=kind)

    monkeypatch.setattr(MetricLog, "write", fill)
    run(make_config(train={"train_steps": 6, "valid_steps": 1, "train_batch_size": 2}, logging={"log_interval": 1}))
    output = capfd.readouterr().out
    assert "metrics.jsonl cannot be written (No space left on device): the run continues" in output
    assert "metrics.jsonl is written again" in output
    rows = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert CheckpointStore(str(tmp_path / "run" / "checkpoints"), 1).steps() == [6]


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_checkpoint_that_could_not_be_written_is_tried_again(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is room for metrics, but not for the checkpoint of step 6, until step 8."""
    write, limits = MetricLog.write, contextlib.ExitStack()

    def fill(log: MetricLog, rows: list[dict[str, float]], *, kind: str) -> None:
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            time.sleep(0.01)  # so that the write behind the training has failed
        if rows[-1]["step"] == 6:
            limits.enter_context(file_size_limit(20_000))
        elif rows[-1]["step"] == 8:
            limits.close()
        write(log, rows, kind=kind)

    monkeypatch.setattr(MetricLog, "write", fill)
    monkeypatch.setattr("pretrain_xla.run_folder.checkpoint.RETRY", 0.0)
    train = {"train_steps": 12, "valid_steps": 1, "train_batch_size": 2}
    with limits:
        run(make_config(train=train, logging={"log_interval": 1}, checkpoint={"save_interval": 6}))
    said = " ".join(capfd.readouterr().out.split())
    assert "the checkpoint of step 6 could not be written (File too large: raise the limit on file size" in said
    assert "training goes on, and another is tried in 0 s, or when it is due" in said
    first, last = CheckpointStore(str(tmp_path / "run" / "checkpoints"), 9).steps()
    assert 6 < first < last == 12, "tried again before the next is due"


def test_samples_and_tensorboard_on_a_full_disk(
    make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    warnings = list[str]()
    log = MetricLog(make_config(logging={"tensorboard": True}), 0, warnings.append)
    (tmp_path / "run" / "samples.txt").symlink_to("/dev/full")
    log.write_sample(1, "a text")
    assert len(warnings) == 1
    assert "samples.txt cannot be written (No space left on device): the run continues" in warnings[0]
    with file_size_limit(4000):
        for step in range(1, 26):
            log.write([{"step": step, **{f"value_{number}": 1.0 for number in range(4)}}], kind="train")
        log.close()
    assert warnings[1:-1] == ["TensorBoard events cannot be written (File too large): the run continues without them"]
    assert "samples.txt: the last 2 lines could not be written and are lost" in warnings[-1]
    assert "Traceback" not in capfd.readouterr().err
    assert len(read_metrics(str(tmp_path / "run" / "metrics.jsonl"))) == 25
