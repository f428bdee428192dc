"""Fixtures of the tests of training and of the run folder: small configs, a runtime on the CPU, and shards of random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.runtime.torch_runtime import TorchRuntime

TINY = {
    "vocab_size": 37,
    "vocab_multiple": 8,
    "seq_length": 8,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Splitting tensors this small over threads takes longer than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """A small run on the torch runtime that writes below `tmp_path`; keywords are sections and their changes."""

    def make(**changes: dict[str, Any]) -> RunConfig:
        tree: dict[str, dict[str, Any]] = {
            "model": TINY,
            "data": {"train_dir": str(tmp_path / "data" / "train"), "valid_dir": str(tmp_path / "data" / "valid")},
            "optim": {
                "warmup_steps": 2,
                "decay_steps": 20,
                "learning_rate": 1e-2,
                "min_lr": 1e-3,
                "max_grad_norm": 1.0,
            },
            "train": {"train_steps": 2, "valid_steps": 2, "train_batch_size": 4, "eval_batch_size": 4},
            "parallel": {"runtime": "torch", "device": "cpu"},
            "logging": {"run_dir": str(tmp_path / "run"), "tensorboard": False},
        }
        return build_config({key: tree.get(key, {}) | changes.get(key, {}) for key in {**tree, **changes}}, "test")

    return make


@pytest.fixture
def runtime(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchRuntime]:
    """The torch runtime on this host's CPU, with one process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    runtime = TorchRuntime(make_config())
    yield runtime
    runtime.close()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Shards of random tokens in `train` and `valid`, where `make_config` looks for them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("valid", 100)):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        np.save(folder / "000.npy", rng.integers(0, TINY["vocab_size"], count).astype(np.uint16))
    return tmp_path / "data"
