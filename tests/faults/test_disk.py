"""The disk of one of two processes fills up: a limit on the size of its files, which the system enforces."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Running, checkpoints, free_port, metrics, records, wait_for_steps

STEPS = 60
CHANGES = {
    "train_steps": STEPS,
    "decay_steps": STEPS,
    "save_interval": 5,
    "valid_interval": STEPS,
    "seq_length": 8,
    "log_interval": 1,
    "valid_steps": 1,
    "dropout": 0.1,
}
FULL, ROOM = 8_192, resource.RLIM_INFINITY
"""Bytes that a file may have: fewer than a share of a checkpoint, more than what says that it failed."""


def limit(one: Running, size: int) -> None:
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (size, ROOM))


@pytest.fixture
def start_two(start: Callable[..., Running]) -> Callable[[list[str]], list[Running]]:
    """Starts two processes of torch DDP."""

    def run(command: list[str]) -> list[Running]:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
        return [
            start(f"rank{index}", ["run_pretrain.py", *command], server=index, **shared, **own)
            for index, own in enumerate(ranks)
        ]

    return run


def test_a_full_disk_of_one_process(
    tmp_path: Path, flags: Callable[..., list[str]], start_two: Callable[[list[str]], list[Running]]
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    assert [one.wait() for one in start_two(flags(undisturbed, **CHANGES))] == [0, 0]

    # Training goes on without new checkpoints; only the last must succeed. Then all end, each with one line.
    first, second = start_two(flags(folder, **CHANGES))
    wait_for_steps(11, first, second)
    limit(second, FULL)
    assert second.wait() == 2
    ended = time.monotonic()
    assert first.wait(60) == 2
    assert time.monotonic() - ended < 60
    failed = r"the checkpoint of step \d+ could not be written \({}File too large: raise the limit on file size \(ulimit -f\), "
    theirs, own = failed.format("process 1 could not write its share: "), failed.format("")
    assert re.search(theirs, " ".join(first.output.split())), "said when it happens"
    assert [len(one.errors) for one in (first, second)] == [1, 1], (first.errors, second.errors)
    assert re.match(f"error: .*({own}|{theirs})", first.errors[0]), first.errors
    assert re.match(f"error: .*({own}|{theirs})", second.errors[0]), second.errors
    newest = max(checkpoints(folder))
    assert newest < STEPS
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, STEPS + 1)), "no row is lost"

    # With room, the same command continues.
    first, second = start_two(flags(folder, **CHANGES))
    assert [first.wait(), second.wait()] == [0, 0], (first.errors, second.errors)
    assert f"continuing from {folder}/checkpoints/step_{newest:08d}" in first.output
    assert records(folder) == records(undisturbed)
    assert max(checkpoints(folder)) == STEPS
