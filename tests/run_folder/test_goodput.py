"""The account of a run over its starts: what counted, what was spent otherwise, and what was lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pretrain_xla.run_folder.goodput import Goodput, read_starts


def write_rows(folder: Path, *rows: tuple[int, float]) -> None:
    lines = [{"step": step, "loss": 1.0, "step_seconds": seconds} for step, seconds in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_over_two_starts(tmp_path: Path) -> None:
    """A hundred seconds: 20 in steps that counted, 10 in steps made again; the first start was killed after step 6."""
    now = time.time()
    first = Goodput(str(tmp_path), 0, now - 100)
    first.begins_steps()
    first._spent["starting"] = 8.0
    first.first_step(4.0)
    with first.spending("validation"):
        time.sleep(0.01)
    rows = [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0, "step_seconds": 12.0}]
    first.count(rows)
    assert "goodput" not in rows[0]
    assert rows[1]["goodput"] == pytest.approx(0.12, abs=0.01)
    first.keep(4)
    first.first_step(1e6)  # after the last line, so nobody knows
    first.close()
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"until": 1')  # a kill cuts a line off
    write_rows(tmp_path, (3, 12.0), (4, 3.0), (6, 10.0))
    second = Goodput(str(tmp_path), 4, now - 30)
    second.first_step(2.0)
    second.count([{"step": 8, "loss": 1.0, "step_seconds": 5.0}])
    second.keep(8)
    summary = second.summary()
    second.close()
    assert summary["starts"] == 2
    assert summary["wall_seconds"] == pytest.approx(100, abs=2)
    assert summary["goodput"] == pytest.approx(0.2, abs=0.01)
    parts = summary["wall_seconds_in"]
    assert (parts["steps"], parts["starting"], parts["first step"]) == (20.0, 8.0, 6.0)
    assert parts["lost"] == pytest.approx(100 - 20 - 8 - 6, abs=2)
    assert [("began" in line, line["step"]) for line in read_starts(str(tmp_path / "starts.jsonl"))] == [
        (True, 0),
        (False, 4),
        (True, 4),
        (False, 8),
    ]


def test_a_new_run_begins_a_new_account_and_damage_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    strange = [
        b"\xff",
        b"3",
        b'{"step": "x"}',
        b'{"step": 1, "seconds": 3}',
        b'{"step": 1, "began": "x"}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join([*strange, b'{"step": 0, "began": 5.0}', b""]))
    assert read_starts(str(path)) == [{"step": 0, "began": 5.0}]
    Goodput(str(tmp_path), 0).close()
    assert len(read_starts(str(path))) == 1
    nowhere = Goodput(None)
    nowhere.keep(3)
    assert nowhere.summary()["starts"] == 1
