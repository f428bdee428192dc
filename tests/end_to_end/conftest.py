"""Runs the entry points as a user does: a subprocess, its exit status, what it printed and the files it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .. import forks

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 200
SEQ_LENGTH = 32
# XLA's own passes stay on. LLVM's expensive passes would take a third of a small run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command."""

    status: int
    output: str
    errors: str

    @property
    def last_error(self) -> str:
        """The last line on stderr."""
        return self.errors.strip().splitlines()[-1] if self.errors.strip() else ""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: without variables that choose a device or a rank, and with LLVM's optimizations off."""
    dropped = ("PJRT_DEVICE", "CPU_NUM_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": QUICK} | extra


def run(
    *command: str, cwd: Path = ROOT, timeout: float = 300, stdin: str = "", fresh: bool = False, **extra: str
) -> Result:
    """Run a command of the package to its end; extra keywords are environment variables.

    It runs in a fork of a process that has loaded PyTorch. `fresh` runs it as a user does: in a new interpreter, with the
    compiler's default flags.
    """
    if fresh:
        extra = {"XLA_FLAGS": ""} | extra
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment(**extra),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    else:
        done = forks.run(command, environment(**extra), cwd, stdin, timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def torchrun(processes: int, *command: str, timeout: float = 300) -> Result:
    """Run a command under torchrun with this many processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return run(*launcher, *command, timeout=timeout, OMP_NUM_THREADS="1")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Training loss of each step."""
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


def summary(run_dir: Path) -> dict[str, Any]:
    """A run's summary.json."""
    result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return result


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that can be learnt: random walks over 200 ids, three shards to train on and one to validate on."""
    root = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("valid", 1)):
        (root / split).mkdir()
        for index in range(count):
            walk = np.cumsum(rng.integers(0, 3, 20_000)) % VOCAB_SIZE
            np.save(root / split / f"{index:03d}.npy", walk.astype(np.uint16))
    return root


@pytest.fixture(scope="session")
def flags(tokens: Path) -> Callable[..., list[str]]:
    """Builds the flags of a small run; keywords replace or add flags (`True` gives a bare flag, `None` omits one)."""

    def build(run_dir: Path, **changes: Any) -> list[str]:
        values: dict[str, Any] = {
            "train_dir": tokens / "train",
            "valid_dir": tokens / "valid",
            "run_dir": run_dir,
            "vocab_size": VOCAB_SIZE,
            "seq_length": SEQ_LENGTH,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 4,
            "d_ff": 64,
            "train_steps": 20,
            "valid_steps": 3,
            "valid_interval": 10,
            "save_interval": 10,
            "log_interval": 4,
            "train_batch_size": 8,
            "eval_batch_size": 8,
            "warmup_steps": 4,
            "decay_steps": 20,
            "learning_rate": 0.01,
            "min_lr": 0.001,
            "max_grad_norm": 1.0,
            "weight_decay": 0.1,
            "tensorboard": False,
        } | changes
        result = []
        for key, value in values.items():
            name = key.replace("_", "-")
            if value is True:
                result.append(f"--{name}")
            elif value is False:
                result.append(f"--no-{name}")
            elif value is not None:
                result += [f"--{name}", *(str(value).split() if isinstance(value, str) else [str(value)])]
        return result

    return build
