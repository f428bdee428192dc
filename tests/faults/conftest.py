"""Real processes and real signals: a pod in small, and torch DDP.

A pod in small is N processes that agree as the hosts of a pod do. XLA's CPU client cannot join processes in one program, so
each computes the whole step on its own virtual devices.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .. import forks
from ..end_to_end.conftest import ROOT, environment, flags, metrics, tokens

__all__ = ["flags", "tokens"]

SILENCE = 4
"""--host-timeout of the tests, in seconds."""


class Running:
    """A started command with its output in files."""

    def __init__(self, folder: Path, name: str, command: list[str], server: int, **extra: str) -> None:
        (folder / "in").touch()
        self._out, self._err = (folder / f"{name}.{stream}" for stream in ("out", "err"))
        for path in (self._out, self._err):
            path.write_text("")
        streams = [str(path) for path in (folder / "in", self._out, self._err)]
        self._fork = forks.Fork(command, environment(**extra), ROOT, streams, server)
        self.pid = self._fork.pid

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 180) -> int:
        """Its exit status; negative: the signal that ended it."""
        return self._fork.wait(seconds)

    @property
    def output(self) -> str:
        """What it printed so far on stdout."""
        return self._out.read_text()

    @property
    def errors(self) -> list[str]:
        """Lines on stderr so far, without notes."""
        return [line for line in self._err.read_text().splitlines() if not line.startswith("note: ")]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts commands, and kills those that are left at the end."""
    started: list[Running] = []

    def run(name: str, command: list[str], server: int = 0, **extra: str) -> Running:
        started.append(Running(tmp_path, name, command, server, **extra))
        return started[-1]

    yield run
    for one in started:
        if one._fork.status is None and one._fork.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                one.send(signal.SIGKILL)
            one.wait()


@pytest.fixture
def start_pod(start: Callable[..., Running]) -> Callable[..., list[Running]]:
    """Starts a pod in small: one process for each list of flags."""

    def run(*commands: list[str]) -> list[Running]:
        port = free_port()
        return [
            start(
                f"host{index}",
                ["run_pretrain_xla.py", *command, "--host-timeout", str(SILENCE)],
                server=index,
                PJRT_DEVICE="CPU",
                CPU_NUM_DEVICES="1",
                PRETRAIN_XLA_REHEARSAL=f"{index}/{len(commands)}@127.0.0.1:{port}",
            )
            for index, command in enumerate(commands)
        ]

    return run


def steps_on_disk(run_dir: Path) -> int:
    """The last step whose metrics are on disk."""
    return max(row["step"] for row in metrics(run_dir))


def wait_for_steps(count: int, printing: Running, *others: Running, seconds: float = 180) -> None:
    """Wait until a process has printed that many steps; fails if one ends before."""
    deadline, processes = time.monotonic() + seconds, (printing, *others)
    while len(re.findall(r"^step +\d+/\d+ ", printing.output, re.MULTILINE)) < count:
        assert time.monotonic() < deadline, [one.errors for one in processes]
        assert all(one._fork.poll() is None for one in processes), [one.errors for one in processes]
        time.sleep(0.01)


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step_*/checkpoint.json"))


def wait_for_checkpoint(run_dir: Path, seconds: float = 60) -> None:
    """Wait until there is a complete checkpoint."""
    deadline = time.monotonic() + seconds
    while not checkpoints(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def records(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a run has logged: step, loss, gradient norm, validation loss."""
    keys = ("step", "loss", "grad_norm", "valid_loss")
    return [tuple(row.get(key) for key in keys) for row in metrics(run_dir)]
