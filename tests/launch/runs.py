"""What the launches of the tests train, and what must hold at their end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain_xla.launch.command import launch_command

from ..end_to_end.conftest import metrics
from .gcloud import machines
from .gcloud.world import ROOT, World

TIMING = {
    "poll": 0.1, "zone_wait": 2, "only_zone_wait": 30, "first_backoff": 0.1, "longest_backoff": 0.2, "retry": 0.1, "call": 60,
    "setup": 120, "ready": 60, "follow": 20, "heartbeat": 0.3, "silence": 30, "unreachable": 15, "stop": 60, "progress": 5,
    "lease": 60,
}  # fmt: skip
STEPS, EVERY = 160, 20
"""Steps of a run, and between two checkpoints. A step takes a few milliseconds, and events are noticed within 50."""
CHANGES = {
    "runtime": "torch",
    "device": "cpu",
    "train_steps": STEPS,
    "decay_steps": STEPS,
    "save_interval": EVERY,
    "valid_interval": 80,
    "valid_steps": 1,
    "log_interval": 1,
    "seq_length": 8,
}
SECRET = secrets.token_hex(16)
TRAINING = {
    "PJRT_DEVICE": "CPU",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
"""Variables of the training, wherever it runs."""
Records = list[tuple[Any, ...]]


def workers(world: World, **more: str) -> dict[str, str]:
    """The environment of a world's workers: with its own gcloud, and a uv that installs nothing."""
    path = f"{Path(__file__).parent / 'on_worker'}:{world.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    return {**TRAINING, "PATH": path, "STAND_IN_PYTHON": sys.executable, **more}


def records(folder: Path) -> Records:
    """Step, loss, gradient norm and validation loss of all that a run has logged."""
    keys = ("step", "loss", "grad_norm", "valid_loss")
    return [tuple(row.get(key) for key in keys) for row in metrics(folder)]


def run_undisturbed(folder: Path, flags: Callable[..., list[str]], *environments: dict[str, str]) -> Records:
    """The records of a run that nobody disturbs: one process for each environment."""
    command = [sys.executable, "run_pretrain_xla.py", *flags(folder, **CHANGES)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **TRAINING, "PYTHONPATH": str(ROOT), **one}, stdout=subprocess.DEVNULL
        )
        for one in environments
    ]
    assert [process.wait() for process in started] == [0] * len(started)
    return records(folder)


class Launcher:
    """Launches a run of the tests' own: all of its folders are below one, and its data are the tests'."""

    def __init__(self, folder: Path, flags: Callable[..., list[str]]) -> None:
        self.folder, self._flags = folder, flags

    @property
    def records(self) -> Records:
        """What the run's records say that were copied back."""
        return records(self.folder / "records")

    def __call__(self, *own: str, topology: str = "v5e-8") -> int:
        folders = ["--bucket", str(self.folder / "bucket" / "run"), "--run-folder", str(self.folder / "records")]
        base = ["--topology", topology, "--no-preflight", "--uncommitted", "send", "--spot", *folders, *own]
        return launch_command([*base, "--", *self._flags(None, **CHANGES)])


def check_nothing_is_left(world: World) -> None:
    """No resource in any zone, no process on any worker; all that was planned happened, and there were never two slices."""
    assert world.left() == []
    assert [line for machine in world.machines for line in machines.commands(machine)] == []
    assert world.open_events() == []
    assert world.most <= 1


def check_secret_is_kept(world: World, folder: Path) -> None:
    """The run had the secret, and no file and no command line has it."""
    assert any(SECRET in one for one in world.environments)
    assert not [one for one in world.processes if SECRET in one]
    kept = subprocess.run(["grep", "-rlF", SECRET, str(folder)], capture_output=True, text=True)
    assert kept.stdout == ""
