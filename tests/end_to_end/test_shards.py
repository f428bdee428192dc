"""Other people's shards, and a bucket's, train through the door without a word of configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.peers import WRITERS
from tests.servers import FaultyProxy, gcs_emulator, gcs_environment, upload

from .conftest import VOCAB_SIZE, losses, run, summary

SHORT = {"train_steps": 6, "decay_steps": 6, "warmup_steps": 2, "valid_interval": 6, "save_interval": 6}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokens in each format: a folder each, training and validation side by side, told apart by name."""
    root = tmp_path_factory.mktemp("peers")
    walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 30_000)) % VOCAB_SIZE
    for name, write in WRITERS.items():
        (root / name).mkdir()
        for number, ids in enumerate(np.split(walk, [10_000, 20_000])):
            write(
                root / name / f"set_{'train' if number else 'val'}_{number:06d}.{name.rpartition('.')[2]}", ids.tolist()
            )
    return root


@pytest.fixture(scope="module")
def expected(peers: Path, tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> list[float]:
    """Losses of the run on the `.npy` shards."""
    folder, run_dir = peers / "build_nano_gpt.npy", tmp_path_factory.mktemp("expected")
    done = run("run_pretrain.py", *flags(run_dir, train_dir=folder, valid_dir=folder, device="cpu", **SHORT))
    assert done.status == 0, done.errors
    assert len(losses(run_dir)) == 6
    return losses(run_dir)


@pytest.mark.parametrize("name", ["llm_c.bin", "nano_gpt.bin", "blocks.parquet"])
def test_peers_files_train(
    name: str, peers: Path, expected: list[float], tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    folder = peers / name
    same = flags(tmp_path, train_dir=folder, valid_dir=folder, device="cpu", **SHORT)
    done = run("run_pretrain.py", *same, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.status == 0, done.errors
    assert losses(tmp_path) == expected


def test_from_a_bucket_with_faults_to_checkpoints_in_it(
    peers: Path, expected: list[float], tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    """Through the XLA door, straight from gs://, while one read in three fails; then on from a checkpoint in the bucket."""
    with gcs_emulator() as emulator, FaultyProxy(emulator) as proxy:
        data = upload(emulator, peers / "llm_c.bin", "peers")
        met: list[str] = []

        def fault(path: str, span: str | None) -> str | None:
            if "alt=media" not in path or "peers" not in path:
                return None
            met.append(path)
            return ["broken", None, None, "503", None, None][len(met) % 6]

        proxy.fault = fault
        changes = {"train_dir": data, "valid_dir": data, "cache_dir": tmp_path / "cache"}
        changes |= {"checkpoints_dir": "gs://tokens/checkpoints"}
        there = gcs_environment(proxy.address) | {"PJRT_DEVICE": "CPU"}
        done = run("run_pretrain_xla.py", *flags(tmp_path / "run", **SHORT | changes), "--strict-graph", **there)
        assert done.status == 0, done.errors
        np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-4)
        assert met
        longer = SHORT | changes | {"train_steps": 8}
        done = run("run_pretrain.py", *flags(tmp_path / "run", **longer, device="cpu"), **there)
        assert done.status == 0, done.errors
        assert summary(tmp_path / "run")["resumed_from_step"] == 6
        assert len(losses(tmp_path / "run")) == 8
