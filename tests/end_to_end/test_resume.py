"""What a run saves when it is asked to stop, and that what it saved moves between runtimes and meshes.

tests/faults/test_kills.py holds that a killed run continues bit for bit.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, environment, metrics, run

ENTRY_POINTS = {"torch": ("run_pretrain.py", {}), "xla": ("run_pretrain_xla.py", {"PJRT_DEVICE": "CPU"})}
# AdamW for some parameters and Muon for the others, with all of its state, and the mean of the weights.
MUON: dict[str, Any] = {
    "optim_type": "muon",
    "muon_row_beta": 0.9,
    "muon_momentum_warmup": 15,
    "average_fraction": 0.7,
}
# Dropout, accumulation and several epochs: everything that the next step depends on.
CHANGES: dict[str, Any] = MUON | {
    "dropout": 0.1,
    "train_batch_size": 4,
    "gradient_accum_step": 2,
    "log_interval": 1,
    "strict_graph": True,
}


def start_and_signal(command: list[str], run_dir: Path, step: int, number: int, extra: dict[str, str]) -> int:
    """Start a run, send it a signal once the metrics of `step` are on disk; returns its exit status."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(**extra), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (run_dir / "metrics.jsonl").exists() and any(row["step"] >= step for row in safe_metrics(run_dir)):
                os.kill(process.pid, number)
                break
            time.sleep(0.002)
        return process.wait(timeout=120)
    finally:
        process.kill()


def safe_metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return metrics(run_dir)
    except ValueError:
        return []  # a line is being written


@pytest.mark.parametrize("runtime", ENTRY_POINTS)
def test_sigterm_saves_a_checkpoint(runtime: str, tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    entry_point, extra = ENTRY_POINTS[runtime]
    changes = CHANGES | {"train_steps": 1000, "decay_steps": 1000, "save_interval": 1000, "valid_interval": 1000}
    command = [entry_point, *flags(tmp_path, **changes)]
    assert start_and_signal(command, tmp_path, 3, signal.SIGTERM, extra) == 128 + signal.SIGTERM
    saved = list((tmp_path / "checkpoints").glob("step_*/checkpoint.json"))
    assert len(saved) == 1
    step = int(saved[0].parent.name.removeprefix("step_"))
    assert max(row["step"] for row in metrics(tmp_path)) == step


def test_checkpoints_move_between_runtimes_and_meshes(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    """A run that moves over meshes, runtimes and numbers of processes has the loss curve of one that stays where it began.

    With Muon, with stacked layers on one of the meshes, and with two processes that write a checkpoint together.
    """
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    one, four = {"PJRT_DEVICE": "CPU"}, {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    sharded = {"mesh_fsdp": 2, "mesh_tensor": 2, "scan_layers": True, "strict_graph": True}
    xla, torch = ("run_pretrain_xla.py",), ("run_pretrain.py",)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_pretrain.py")
    assert run(*xla, *flags(stayed, **MUON), **four).status == 0
    for steps, entry_point, changes, extra in (
        (4, xla, {}, four),
        (8, xla, sharded, four),
        (12, xla, {}, one),
        (16, two, {}, {"OMP_NUM_THREADS": "1"}),
        (18, torch, {}, {}),
        (20, xla, {}, four),
    ):
        done = run(*entry_point, *flags(moved, train_steps=steps, decay_steps=20, **MUON, **changes), **extra)
        assert done.status == 0, done.errors
        files = {path.name for path in (moved / "checkpoints" / f"step_{steps:08d}").iterdir()}
        assert ("__1_0.distcp" in files) == (entry_point is two), "each process writes its share"
    curves = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (stayed, moved)]
    assert len(curves[0]) == 20
    assert curves[1][:4] == curves[0][:4], "bit for bit on the same mesh"
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_the_newest_and_the_best_are_kept(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run("run_pretrain.py", *flags(tmp_path, save_interval=2, saved_checkpoint_limit=2))
    assert done.status == 0, done.errors
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000018", "step_00000020"]
    again = run("run_pretrain.py", *flags(tmp_path, save_interval=2, saved_checkpoint_limit=2))
    assert again.status == 0
    assert "already made its 20 steps" in again.output
    assert run("run_pretrain.py", *flags(tmp_path), "--no-resume").status == 2
