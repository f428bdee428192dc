"""A pod in small: hosts are killed, asked to stop, stopped, and fail; what continues is what would have been."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from ..end_to_end.conftest import run
from .conftest import SILENCE, Running, checkpoints, records, steps_on_disk, wait_for_checkpoint, wait_for_steps

CHANGES = {
    "train_steps": 120,
    "decay_steps": 120,
    "save_interval": 10,
    "valid_interval": 40,
    "log_interval": 1,
    "seq_length": 8,
    "valid_steps": 1,
    "dropout": 0.1,
}
NOTICED = SILENCE + 20
"""Seconds in which a host must have noticed that another is gone, and have left, on a busy machine."""


def test_hosts_end_together_and_continue_bit_for_bit(
    tmp_path: Path, flags: Callable[..., list[str]], start_pod: Callable[..., list[Running]]
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    alone = run("run_pretrain_xla.py", *flags(undisturbed, **CHANGES), PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1")
    assert alone.status == 0, alone.errors
    command = flags(folder, **CHANGES)

    # Killed: the other says so in one line, and ends with the status that a supervisor knows.
    first, second = pod = start_pod(command, command)
    wait_for_steps(11, *pod)
    wait_for_checkpoint(folder)
    second.send(signal.SIGKILL)
    began = time.monotonic()
    assert first.wait() == 75
    assert time.monotonic() - began < NOTICED
    (line,) = first.errors
    assert line.startswith(f"error: process 1 of 2 (pid {second.pid} on ")
    assert f"has not answered for {SILENCE} s" in line
    assert second.wait() == -signal.SIGKILL

    # Asked to stop, on one host alone: both stop at the same step, and it is saved.
    begin = max(checkpoints(folder))
    first, second = pod = start_pod(command, command)
    wait_for_steps(3, *pod)
    second.send(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    stopped = max(checkpoints(folder))
    assert stopped == steps_on_disk(folder)
    assert stopped > begin
    assert first.errors == [f"stopped at step {stopped}; the same command continues from there"]
    (answer,) = second.errors
    assert answer.endswith("and saving; again to leave at once")
    assert f"continuing from {folder}/checkpoints/step_{begin:08d}" in first.output

    # Stopped without an end, the one whose process the others meet in.
    first, second = pod = start_pod(command, command)
    wait_for_steps(3, *pod)
    first.send(signal.SIGSTOP)
    began = time.monotonic()
    assert second.wait() == 75
    assert time.monotonic() - began < NOTICED
    (line,) = second.errors
    assert line.startswith(f"error: process 0 of 2 (pid {first.pid} on ")
    first.send(signal.SIGKILL)
    first.wait()

    pod = start_pod(command, command)
    assert [one.wait() for one in pod] == [0, 0], [one.errors for one in pod]
    assert records(folder) == records(undisturbed)


def test_one_that_fails_ends_all_with_its_message(
    tmp_path: Path, flags: Callable[..., list[str]], start_pod: Callable[..., list[Running]]
) -> None:
    folder, nowhere = tmp_path / "run", tmp_path / "nowhere"
    first, second = start_pod(flags(folder), flags(folder, train_dir=nowhere))
    assert (first.wait(), second.wait()) == (2, 2)
    (told,), (own,) = first.errors, second.errors
    assert own.startswith(f"error: {nowhere}")
    assert told == f"error: process 1 of 2 ({told.split('(')[1].split(')')[0]}): {own.removeprefix('error: ')}"
    assert not folder.exists(), "nothing is left of a run that is refused"

    # Disks of their own: refused, before any training.
    first, second = start_pod(flags(folder), flags(folder, checkpoints_dir=tmp_path / "elsewhere"))
    assert (first.wait(), second.wait()) == (2, 2)
    assert "is not the same folder everywhere: process 1 of 2" in first.errors[-1]
    assert "put it on a disk that all hosts share" in second.errors[-1]
