"""For all tests: waiting threads sleep, the files that take longest run first, and fixtures find real data.

Torch's OpenMP threads spin while they wait for each other, which is fast on an idle host and takes four times the CPU
time where several test processes share a few cores. Set here, before anything loads torch, and inherited by the
processes that tests start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("busy_machine", deadline=None)  # deadlines would fail under the load of other processes
settings.load_profile("busy_machine")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LONGEST = ("end_to_end", "preflight", "model", "examples")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest, so that at the end no worker waits for another's long file.

    pytest-xdist keeps this order with `--no-loadscope-reorder`; by itself it puts the files with the most tests first.
    """
    rank = {folder: number for number, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path of a file of real data; skips where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"real data is absent: ../shared/data/{name}")
        return SHARED / name

    return find


@pytest.fixture
def gpt2_cache(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `tiktoken` find GPT-2's vocabulary without a network."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tokenizers/tiktoken_cache")))


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., str]:
    """Writes shards with `np.save`, as a user's script would, and returns their folder."""

    def write(*shards: np.ndarray, folder: str = "shards") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        for number, tokens in enumerate(shards):
            np.save(tmp_path / folder / f"{number:03d}.npy", tokens)
        return str(tmp_path / folder)

    return write
