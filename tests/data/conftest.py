"""What the tests of data share: real data where there is some, and datasets of random tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("busy_machine", deadline=None)  # a neighbour's load is no fault of the code
settings.load_profile("busy_machine")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


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
    """Writes shards as anyone's script would, with `np.save`, and returns their folder."""

    def write(*shards: np.ndarray, folder: str = "shards") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        for number, tokens in enumerate(shards):
            np.save(tmp_path / folder / f"{number:03d}.npy", tokens)
        return str(tmp_path / folder)

    return write
