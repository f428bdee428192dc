"""Shards of other projects, on disk or in a bucket, train without any configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.servers import FaultyProxy, gcs_emulator, gcs_environment, upload
from tests.shard_writers import WRITERS

from .conftest import VOCAB_SIZE, losses, run, summary

SHORT = {"train_steps": 6, "decay_steps": 6, "warmup_steps": 2, "valid_interval": 6, "save_interval": 6}


@pytest.fixture(scope="module")
def other_projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokens in each format: one folder per format, training and validation shards together, distinguished by name."""
    root = tmp_path_factory.mktemp("other_projects")
    walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 30_000)) % VOCAB_SIZE
    for name, write in WRITERS.items():
        (root / name).mkdir()
        for number, ids in enumerate(np.split(walk, [10_000, 20_000])):
            write(
                root / name / f"set_{'train' if number else 'val'}_{number:06d}.{name.rpartition('.')[2]}", ids.tolist()
            )
    return root


@pytest.fixture(scope="module")
def expected(
    other_projects: Path, tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]
) -> list[float]:
    """Losses of the run on the `.npy` shards."""
    folder, run_dir = other_projects / "build_nano_gpt.npy", tmp_path_factory.mktemp("expected")
    done = run("run_pretrain.py", *flags(run_dir, train_dir=folder, valid_dir=folder, device="cpu", **SHORT))
    assert done.status == 0, done.errors
    assert len(losses(run_dir)) == 6
    return losses(run_dir)


@pytest.mark.parametrize("name", ["llm_c.bin", "nano_gpt.bin", "blocks.parquet"])
def test_shards_of_other_projects_train(
    name: str, other_projects: Path, expected: list[float], tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    folder = other_projects / name
    same = flags(tmp_path, train_dir=folder, valid_dir=folder, device="cpu", **SHORT)
    done = run("run_pretrain.py", *same, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.status == 0, done.errors
    assert losses(tmp_path) == expected


def test_data_and_checkpoints_in_a_faulty_bucket(
    other_projects: Path, expected: list[float], tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    """Train on XLA from gs:// while one read in three fails; then resume elsewhere, on torch, from what the bucket has."""
    with gcs_emulator() as emulator, FaultyProxy(emulator) as proxy:
        data = upload(emulator, other_projects / "llm_c.bin", "shards")
        reads: list[str] = []

        def fault(path: str, span: str | None) -> str | None:
            if "alt=media" not in path or "shards" not in path:
                return None
            reads.append(path)
            return ["broken", None, None, "503", None, None][len(reads) % 6]

        proxy.fault = fault
        changes = {"train_dir": data, "valid_dir": data, "cache_dir": tmp_path / "cache"}
        changes |= {"checkpoints_dir": "gs://tokens/checkpoints"}
        emulated = gcs_environment(proxy.address) | {"PJRT_DEVICE": "CPU"}
        done = run("run_pretrain_xla.py", *flags(tmp_path / "run", **SHORT | changes), "--strict-graph", **emulated)
        assert done.status == 0, done.errors
        np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-4)
        assert reads
        longer = SHORT | changes | {"train_steps": 8}
        done = run("run_pretrain.py", *flags(tmp_path / "other", **longer, device="cpu"), **emulated)
        assert done.status == 0, done.errors
        assert summary(tmp_path / "other")["resumed_from_step"] == 6
        assert losses(tmp_path / "other")[:6] == losses(tmp_path / "run")
        assert len(losses(tmp_path / "other")) == 8
