"""`metrics.jsonl` over restarts, and the same numbers in TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.files import set_aside
from pretrain_xla.run_folder.metrics import MetricLog, read_metrics, read_rows
from pretrain_xla.run_folder.report import write_report
from pretrain_xla.run_folder.trackers import WandB

Make = Callable[..., RunConfig]


def rows(first: int, last: int, offset: float = 0.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step + offset, "learning_rate": 0.5} for step in range(first, last + 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Its path; the run's folder exists."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "metrics.jsonl"


def write(config: RunConfig, resumed_step: int, train: list[dict[str, Any]]) -> None:
    log = MetricLog(config, resumed_step)
    log.write(train, kind="train")
    log.close()


def test_a_row_is_a_line_and_on_disk_at_once(make_config: Make, path: Path) -> None:
    log = MetricLog(make_config(), 0)
    log.write(rows(1, 2), kind="train")
    log.write([{"step": 2, "valid_loss": 1.5}], kind="validation")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows(1, 2),
        {"step": 2, "valid_loss": 1.5},
    ]
    log.close()
    assert read_metrics(str(path)) == [*rows(1, 2), {"step": 2, "valid_loss": 1.5}]


def test_nan_and_infinity_are_null_on_disk(make_config: Make, path: Path) -> None:
    write(make_config(), 0, [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    on_disk = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert on_disk == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert [math.isnan(row["loss"]) for row in read_metrics(str(path))] == [True, True]


def test_a_resumed_run_drops_the_rows_of_steps_that_it_repeats(make_config: Make, path: Path) -> None:
    config = make_config()
    log = MetricLog(config, 0)
    log.write([{"step": 0, "valid_loss": 9.0}], kind="validation")
    log.write(rows(1, 4), kind="train")
    log.write([{"step": 4, "valid_loss": 8.0}], kind="validation")
    log.write(rows(5, 7), kind="train")
    log.close()
    write(config, 4, rows(5, 6, offset=0.25))
    assert read_metrics(str(path)) == [
        {"step": 0, "valid_loss": 9.0},
        *rows(1, 4),
        {"step": 4, "valid_loss": 8.0},
        *rows(5, 6, offset=0.25),
    ]


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_a_line_cut_off_by_a_kill_is_repaired(cut: int, make_config: Make, path: Path) -> None:
    config = make_config()
    write(config, 0, rows(1, 5))
    path.write_bytes(path.read_bytes()[:-cut])
    complete = 5 if cut == 1 else 4  # only its line feed is missing, so the last line is complete
    assert read_metrics(str(path)) == rows(1, complete)
    write(config, complete, rows(complete + 1, 6))
    assert read_metrics(str(path)) == rows(1, 6)
    assert len(path.read_text().splitlines()) == 6


def test_a_new_run_empties_the_file(make_config: Make, path: Path) -> None:
    write(make_config(), 0, [{"step": 0, "valid_loss": 9.0}, *rows(1, 5)])
    write(make_config(), 0, rows(1, 1, offset=0.5))
    assert read_metrics(str(path)) == rows(1, 1, offset=0.5)


def test_a_resumed_run_without_a_file_creates_one(make_config: Make, path: Path) -> None:
    write(make_config(), 3, rows(4, 5))
    assert read_metrics(str(path)) == rows(4, 5)
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_repeated_steps_once(make_config: Make, path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    config = make_config(logging={"tensorboard": True})
    write(config, 0, rows(1, 6))
    write(config, 3, rows(4, 5, offset=0.5))
    events = accumulator.EventAccumulator(str(path.parent)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (row["step"], row["loss"]) for row in [*rows(1, 3), *rows(4, 5, offset=0.5)]
    ]
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate"}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.usefixtures("path")
def test_wandb_that_is_not_installed(make_config: Make) -> None:
    with pytest.raises(UserError, match="pip install wandb, or leave out --wandb-logging"):
        WandB(make_config(logging={"wandb_logging": True}), 0, print)


STRANGE = {
    "not UTF-8": b'{"step": 3, "loss": 3.0, "\xff": 1}',
    "no step": b'{"loss": 3.0}',
    "a step that is no number": b'{"step": "3", "loss": 3.0}',
    "a step that is NaN": b'{"step": null, "loss": 3.0}',
    "a loss that is no number": b'{"step": 3, "loss": [3.0]}',
    "a boolean": b'{"step": 3, "loss": true}',
    "a number too large to draw": b'{"step": 3, "loss": 1' + b"0" * 400 + b"}",
    "a number too large to read": b'{"step": 3, "loss": 1' + b"0" * 5000 + b"}",
    "JSON of a great depth": b'{"step": 3, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a row that was cut": b'{"step": 3, "lo',
    "zeros": b"\0" * 64,
    "no object": b"3",
    "an empty line": b"",
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_a_damaged_line_is_said_and_stops_nothing(strange: bytes, make_config: Make, path: Path) -> None:
    write(make_config(), 0, rows(1, 5))
    lines = path.read_bytes().splitlines()
    lines[2] = strange
    damaged = b"\n".join(lines) + b"\n"
    path.write_bytes(damaged)
    assert read_rows(str(path)) == ([*rows(1, 2), *rows(4, 5)], [3])
    said = list[str]()
    log = MetricLog(make_config(), 4, said.append)
    log.close()
    assert said == [
        f"{path}: 1 damaged lines are left out, the first is line 3 and 1 of the steps up to 4 have no row; the file as it "
        f"was is {path}.damaged"
    ]
    assert read_rows(str(path)) == ([*rows(1, 2), *rows(4, 4)], [])
    assert (path.parent / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_summary_of_a_damaged_file_says_so(path: Path) -> None:
    path.write_bytes(
        b"".join(json.dumps(row).encode() + b"\n\xff\n" for row in [{"step": 1, "loss": 3.0}, *rows(2, 3)])
    )
    said = list[str]()
    summary = write_report(str(path.parent), {"parameters": 1, "steps": 3}, said.append)
    assert said == [f"{path}: 3 damaged lines are not in the summary, the first is line 2"]
    assert (summary["first_train_loss"], summary["last_train_loss"]) == (3.0, 3.0)


def test_rows_that_are_missing_are_said(make_config: Make, path: Path) -> None:
    write(make_config(), 0, rows(1, 9))
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))  # as a host that crashed may leave it
    said = list[str]()
    MetricLog(make_config(), 8, said.append).close()
    MetricLog(make_config(), 8, said.append).close()
    assert said == [
        f"{path}: 3 of the steps up to 8 have no row; the file as it was is {path}.damaged{number}"
        for number in ("", "_2")
    ]
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[3:]))  # as of a run that began at step 3
    MetricLog(make_config(), 8, lambda line: pytest.fail(line)).close()


def test_a_file_of_metrics_that_cannot_be_read_is_an_error_of_one_line(make_config: Make, path: Path) -> None:
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: Is a directory"):
        MetricLog(make_config(), 3)


def test_a_new_run_keeps_a_file_of_which_nothing_can_be_read(path: Path) -> None:
    path.write_bytes(b"\xff\n" * 3)
    aside = set_aside(str(path.parent))
    assert aside is not None
    assert (path.parent / "earlier_1" / "metrics.jsonl").read_bytes() == b"\xff\n" * 3


def test_a_damaged_file_of_samples_stops_nothing(make_config: Make, path: Path) -> None:
    samples = path.parent / "samples.txt"
    samples.write_bytes(b"--- step 2\n\xff text\n--- step " + b"9" * 5000 + b"\nlater\n")
    MetricLog(make_config(), 3).close()
    assert samples.read_text() == "--- step 2\n\ufffd text\n"
