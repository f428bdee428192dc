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
from pretrain_xla.run_folder.metrics import MetricLog, read_metrics
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
        WandB(make_config(logging={"wandb_logging": True}), print)
