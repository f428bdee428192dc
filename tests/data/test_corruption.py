"""Random damage to datasets is refused in one line, or does no harm; `benchmarks/corrupt_data.py` tries many more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import corrupt_data
from pretrain_xla.data import manifest, shards, token_file

TRIALS = int(os.environ.get("CORRUPTIONS", "50"))


def test_random_damage(tmp_path: Path) -> None:
    counts, failures = corrupt_data.run(TRIALS, 0, tmp_path)
    assert failures == []
    assert counts["refused"] > TRIALS / 3
    assert counts["unharmed"] > 0  # copies in the cache are made again


def test_the_trials_notice_what_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "is_intact", lambda tree: True)
    monkeypatch.setattr(token_file.TokenFile, "verify", lambda self: None)
    monkeypatch.setattr(shards, "read_checked", lambda read, begin, end, checksums: read(begin, end))
    counts, failures = corrupt_data.run(40, 0, tmp_path)
    assert counts["SILENT"] > 0
    assert failures
