"""A small untrained run whose checkpoint can be read and continued from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.model import GPT, initialize
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from tests.small_run import one_thread  # noqa: F401 (an automatic fixture)


@pytest.fixture
def config() -> RunConfig:
    """A model of bytes, too small to be slow."""
    model = {"vocab_size": 257, "vocab_multiple": 8, "seq_length": 12, "d_model": 16, "num_layers": 2, "num_heads": 2}
    tree = {
        "model": model | {"d_ff": 32, "init": "normal"},
        "data": {"tokenizer": "bytes"},
        "parallel": {"runtime": "torch", "device": "cpu"},
    }
    return build_config(tree, "test")


@pytest.fixture
def model(config: RunConfig) -> GPT:
    """Weights large enough for clear preferences."""
    return make_model(config, seed=3)


@pytest.fixture
def run_dir(config: RunConfig, tmp_path: Path) -> Path:
    """A run with two checkpoints: step 1 is the best, step 2 the newest."""
    store = CheckpointStore(str(tmp_path / "run" / "checkpoints"), limit=2)
    for step, loss in ((1, 1.0), (2, 2.0)):
        tensors = {f"model.{name}": value.detach() for name, value in make_model(config, seed=step).named_parameters()}
        store.save(tensors, CheckpointInfo(step, loss, "data", config.model_dump(mode="json")))
    store.close()
    return tmp_path / "run"


def make_model(config: RunConfig, seed: int) -> GPT:
    """See `model`."""
    model = GPT(config.model)
    initialize(model, seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(10)
    return model
