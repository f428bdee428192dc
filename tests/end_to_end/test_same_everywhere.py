"""Every runtime, mesh and accumulation computes the same 20 steps, from the same weights and batches, in fp32.

The reference is torch, eager, one process. Every other setup must give its loss at each step to 1e-4, and its validation
loss whatever the size of a validation batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import SEQ_LENGTH, VOCAB_SIZE, losses, metrics, run, summary, torchrun

# A modern model: rotary positions, grouped-query attention, query/key norm, gating, pre- and post-norm, a padded vocabulary.
MODERN = {
    "num_kv_heads": 4,
    "num_heads": 8,
    "head_dim": 8,
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "silu",
    "gated": True,
    "bias": False,
    "qk_norm": True,
    "post_norm": True,
    "embedding_norm": True,
    "tie_weights": True,
    # Muon, and AdamW for embeddings and norms.
    "optim_type": "muon",
    "muon_row_beta": 0.9,
    "muon_momentum_warmup": 10,
    "cautious_weight_decay": True,
    "embedding_learning_rate": 2e-3,
    # The last validation is of the mean of the weights.
    "average_fraction": 0.6,
}
XLA = {"PJRT_DEVICE": "CPU"}
FOUR = XLA | {"CPU_NUM_DEVICES": "4"}
XLA_SETUPS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "xla one device": ({}, XLA),
    "xla multiprocess, one replica": ({"mp_start_method": "spawn", "eval_batch_size": 27}, XLA),
    "xla accumulation 2": ({"train_batch_size": 4, "gradient_accum_step": 2}, XLA),
    "spmd data 4": ({"mesh_data": 4, "eval_batch_size": 28}, FOUR),
    "spmd data 4, accumulation 2": (
        {"mesh_data": 4, "train_batch_size": 4, "gradient_accum_step": 2},
        FOUR,
    ),
    "spmd data 4, nested loops": (
        {
            "mesh_data": 4,
            "train_batch_size": 4,
            "gradient_accum_step": 2,
            "scan_layers": True,
            "loss_chunk": 16,  # of the 32 tokens that a device has
            "rematerialization": "full",
        },
        FOUR,
    ),
    "spmd fsdp 4, scan, chunks": ({"mesh_fsdp": 4, "scan_layers": True, "loss_chunk": 24}, FOUR),
    "xla rematerialised": ({"rematerialization": "selective"}, XLA),
    "spmd fsdp 4": ({"mesh_fsdp": 4, "eval_batch_size": 16}, FOUR),
    "spmd tensor 4": ({"mesh_tensor": 4, "eval_batch_size": 5}, FOUR),
    "spmd data 2 x fsdp 2": ({"mesh_data": 2, "mesh_fsdp": 2}, FOUR),
    "spmd data 2 x tensor 2": ({"mesh_data": 2, "mesh_tensor": 2}, FOUR),
    "spmd fsdp 2 x tensor 2, accumulation 4": (
        {"mesh_fsdp": 2, "mesh_tensor": 2, "train_batch_size": 2, "gradient_accum_step": 4},
        FOUR,
    ),
}


@pytest.fixture(scope="module")
def flags(flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Flags of a run that validates on 27 sequences, so some devices and processes have no row of the last batch."""
    folder = tmp_path_factory.mktemp("short")
    walk = np.cumsum(np.random.default_rng(5).integers(0, 3, 27 * SEQ_LENGTH + 1)) % VOCAB_SIZE
    np.save(folder / "0.npy", walk.astype(np.uint16))
    return lambda run_dir, **changes: flags(run_dir, **{"valid_dir": folder, "valid_steps": 99} | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> Path:
    """A run on torch: eager, one process."""
    run_dir = tmp_path_factory.mktemp("eager")
    done = run("run_pretrain.py", *flags(run_dir, **MODERN))
    assert done.status == 0, done.errors
    curve = losses(run_dir)
    assert len(curve) == 20
    assert curve[-1] < 0.95 * curve[0]  # it learns, so that equal curves mean something
    return run_dir


def assert_same(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == pytest.approx(losses(reference), rel=1e-4)
    norms = [[row["grad_norm"] for row in metrics(folder) if "grad_norm" in row] for folder in (run_dir, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    valid = [[row["valid_loss"] for row in metrics(folder) if "valid_loss" in row] for folder in (run_dir, reference)]
    assert len(valid[0]) == 3
    assert valid[0] == pytest.approx(valid[1], rel=1e-4)


@pytest.mark.parametrize("setup", XLA_SETUPS)
def test_xla(setup: str, tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    changes, extra = XLA_SETUPS[setup]
    done = run("run_pretrain_xla.py", *flags(tmp_path, **MODERN, **changes), "--strict-graph", **extra)
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)
    counts = summary(tmp_path)
    assert counts["graphs"] == {"train": 1, "validation": 1, "exchange": 1, "other": 0}
    assert counts["recompilations"] == counts["host_fallbacks"] == counts["unplanned_host_transfers"] == 0


def test_classic_scan(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    """The original GPT-2: LayerNorm, biases, learned positions."""
    eager, scanned = tmp_path / "eager", tmp_path / "scanned"
    done = run("run_pretrain.py", *flags(eager))
    assert done.status == 0, done.errors
    done = run("run_pretrain_xla.py", *flags(scanned, mesh_data=4, scan_layers=True), "--strict-graph", **FOUR)
    assert done.status == 0, done.errors
    assert_same(scanned, eager)
    done = run("run_pretrain_xla.py", *flags(tmp_path / "bf16", mixed_precision="bf16", scan_layers=True), **XLA)
    assert done.status == 0, done.errors
    assert losses(tmp_path / "bf16") == pytest.approx(losses(eager), rel=0.05)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_torch_accumulation(
    accumulation: int, tmp_path: Path, reference: Path, flags: Callable[..., list[str]]
) -> None:
    changes = {"train_batch_size": 8 // accumulation, "gradient_accum_step": accumulation}
    done = run("run_pretrain.py", *flags(tmp_path, **MODERN, **changes))
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)


def test_torch_compile(tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    done = run("run_pretrain.py", *flags(tmp_path, **MODERN), "--compile", "--strict-graph", timeout=580)
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)
    assert summary(tmp_path)["recompilations"] == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_torch_ddp(accumulation: int, tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    changes = {"train_batch_size": 8 // accumulation, "gradient_accum_step": accumulation}
    done = torchrun(2, "run_pretrain.py", *flags(tmp_path, **MODERN, **changes))
    assert done.status == 0, done.errors
    assert_same(tmp_path, reference)


def test_bf16_stays_near_fp32(tmp_path: Path, reference: Path, flags: Callable[..., list[str]]) -> None:
    for entry_point, extra in (("run_pretrain.py", {}), ("run_pretrain_xla.py", XLA)):
        run_dir = tmp_path / entry_point
        done = run(entry_point, *flags(run_dir, **MODERN, mixed_precision="bf16"), **extra)
        assert done.status == 0, done.errors
        assert losses(run_dir) == pytest.approx(losses(reference), rel=0.05)
        assert losses(run_dir) != losses(reference)
