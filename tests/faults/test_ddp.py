"""Two processes of torch DDP under torchrun: one is asked to stop, one is killed, and torchrun itself is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from .conftest import SILENCE, Running, checkpoints, steps_on_disk, wait_for_steps

CHANGES = {"train_steps": 100_000, "decay_steps": 100_000, "save_interval": 200, "valid_interval": 100_000}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def workers(launcher: Running) -> list[int]:
    """Pids of torchrun's processes, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = dict(line.split("=", 1) for line in Path(f"/proc/{child}/environ").read_text().split("\0") if line)
        ranks[int(variables["RANK"])] = child
    return [ranks[0], ranks[1]]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_end_together(tmp_path: Path, flags: Callable[..., list[str]], start: Callable[..., Running]) -> None:
    folder = tmp_path / "run"
    command = [*TORCHRUN, "run_pretrain.py", *flags(folder, **CHANGES), "--host-timeout", str(SILENCE)]

    def begin() -> tuple[Running, list[int]]:
        launcher = start("torchrun", command, OMP_NUM_THREADS="1")
        wait_for_steps(3, launcher)
        return launcher, workers(launcher)

    # Asked to stop, in one process alone: both stop at the same step, which is saved.
    launcher, (_, second) = begin()
    os.kill(second, signal.SIGTERM)
    assert launcher.wait() != 0
    stopped = max(checkpoints(folder))
    assert stopped == steps_on_disk(folder)
    assert f"stopped at step {stopped}; the same command continues from there" in launcher.errors
    assert sum("again to leave at once" in line for line in launcher.errors) <= 2

    # Killed: the other says so in a line, without a trace of its own.
    launcher, (_, second) = begin()
    os.kill(second, signal.SIGKILL)
    assert launcher.wait() != 0
    assert any(line.startswith(f"error: process 1 of 2 (pid {second} on ") for line in launcher.errors), launcher.errors
    assert not [line for line in launcher.errors if line.startswith("[rank")]

    # torchrun itself is killed: its processes end, too, and free the folder.
    launcher, pids = begin()
    launcher.send(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + SILENCE + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
