"""Random damage to checkpoints is refused in one line or costs one interval; see `benchmarks/corrupt_checkpoints.py`."""

from __future__ import annotations

import os

from benchmarks import corrupt_checkpoints

TRIALS = int(os.environ.get("CHECKPOINT_CORRUPTIONS", "120"))


def test_no_damage_loads_silently() -> None:
    ended = corrupt_checkpoints.corrupt(TRIALS, seed=1)
    assert sum(ended.values()) == TRIALS
    assert ended["older one taken"] > TRIALS / 2
    assert ended["refused"] > 0
    assert ended.get("unchanged", 0) < TRIALS / 10, "swapping equal parts"
