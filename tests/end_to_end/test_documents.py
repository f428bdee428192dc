"""Separate documents and tokens that the loss ignores: the same losses from each runtime, mesh and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import losses, metrics, run, summary, torchrun

# Learned positions, which restart with each document. Similar ids follow each other, so micro-batches differ in the
# number of tokens that the loss ignores.
DOCUMENTS = {
    "separate_documents": True,
    "end_of_text": 7,
    "loss_ignore_tokens": "7 9 11 100 101 102 103",
    "num_kv_heads": 2,
    "tie_weights": True,
    "train_steps": 8,
    "valid_interval": 8,
}
FOUR = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
XLA_SETUPS: dict[str, dict[str, Any]] = {
    "data 4, nested loops": {
        "mesh_data": 4,
        "train_batch_size": 4,
        "gradient_accum_step": 2,
        "scan_layers": True,
        "loss_chunk": 64,
        "rematerialization": "full",
    },
    "fsdp 2 x tensor 2, accumulation 4": {
        "mesh_fsdp": 2,
        "mesh_tensor": 2,
        "train_batch_size": 2,
        "gradient_accum_step": 4,
    },
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> Path:
    """A run on torch: eager, one process, one micro-batch."""
    run_dir = tmp_path_factory.mktemp("documents")
    done = run("run_pretrain.py", *flags(run_dir, **DOCUMENTS))
    assert done.status == 0, done.errors
    return run_dir


def assert_same(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == pytest.approx(losses(reference), rel=1e-4)
    for name, tolerance in (("grad_norm", 1e-3), ("valid_loss", 1e-4)):
        values = [[row[name] for row in metrics(folder) if name in row] for folder in (run_dir, reference)]
        assert values[0]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


@pytest.mark.parametrize("setup", XLA_SETUPS)
def test_on_xla(setup: str, tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    changes = DOCUMENTS | XLA_SETUPS[setup]
    done = run("run_pretrain_xla.py", *flags(tmp_path, **changes), "--strict-graph", **FOUR)
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)
    assert summary(tmp_path)["graphs"] == {"train": 1, "validation": 1, "other": 0}


def test_under_ddp(tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    changes = DOCUMENTS | {"train_batch_size": 4, "gradient_accum_step": 2}
    done = torchrun(2, "run_pretrain.py", *flags(tmp_path, **changes))
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)
