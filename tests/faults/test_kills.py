"""Runs that are killed at random moments, some during a save, end bit for bit as if nobody had disturbed them.

`benchmarks/kills.py` does the same with many more kills.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..end_to_end.conftest import run


def test_killed_runs_continue_bit_for_bit(tmp_path: Path) -> None:
    kills = {"xla": 2, "ddp": 3}
    for way, count in kills.items():
        command = ["benchmarks/kills.py", "--ways", way, "--kills", str(count), "--steps", "24", "--seed", "3"]
        done = run(*command, "--folder", str(tmp_path), timeout=550)
        assert done.status == 0, done.errors
        figures = json.loads(done.output)
        assert figures["kills"] >= count
        assert figures["runs complete and equal"] >= 1
        assert figures["resumes"] >= 1
        assert figures["most lost steps"] <= 6, "two intervals: the write behind the training, and the next"
