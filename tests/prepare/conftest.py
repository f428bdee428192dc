from __future__ import annotations

import pytest

from pretrain_xla.prepare import workers


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of seven documents, and processes from the second one on."""
    monkeypatch.setattr(workers, "_CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(workers, "_CHUNKS_BEFORE_WORKERS", 1)
