"""`summary.json` and `loss.png` of a finished run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain_xla.run_folder.report import perplexity, plot_loss, shown, summarise, write_summary

PIL_IMAGE = pytest.importorskip("PIL.Image")


def run(steps: int = 60, slope: float = -0.05) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "valid_loss": 9.0}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 8 + slope * step, "learning_rate": 1e-3 * step, "grad_norm": 1.0})
        if step % 10 == 0:
            rows[-1] |= {"tokens_per_second": 100.0 * step, "mfu": step / 1000}
    rows += [{"step": 30, "valid_loss": 5.0}, {"step": 60, "valid_loss": 5.5}]
    return rows


def test_a_summary_has_first_last_best_and_the_median_rate() -> None:
    scored = [{"step": 30, "piqa/acc": 0.5}, {"step": 60, "piqa/acc": 0.75, "piqa/acc_norm": 0.25}]
    assert summarise([*run(), *scored]) == {
        "first_train_loss": pytest.approx(7.95),
        "last_train_loss": pytest.approx(5.0),
        "first_valid_loss": 9.0,
        "last_valid_loss": 5.5,
        "best_valid_loss": 5.0,
        "best_valid_step": 30,
        "scores": {"piqa/acc": 0.75, "piqa/acc_norm": 0.25},
        "tokens_per_second": 3500.0,
        "mfu": pytest.approx(0.035),
        "skipped_updates": 0,
    }


def test_a_nan_loss_is_not_the_best() -> None:
    rows = [{"step": step, "valid_loss": loss} for step, loss in enumerate([math.nan, 5.0, 4.0, math.nan])]
    assert (summarise(rows)["best_valid_loss"], summarise(rows)["best_valid_step"]) == (4.0, 2)


def test_a_summary_of_nothing() -> None:
    assert set(summarise([]).values()) == {None}


def test_a_summary_is_written_atomically(tmp_path: Path) -> None:
    write_summary(str(tmp_path), {"old": 1})
    with pytest.raises(TypeError):
        write_summary(str(tmp_path), {"new": {1, 2}})  # not JSON: fails half-way through
    assert json.loads((tmp_path / "summary.json").read_text()) == {"old": 1}
    write_summary(str(tmp_path), {"steps": 3})
    assert (tmp_path / "summary.json").read_text() == '{\n  "steps": 3\n}\n'


def plot(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """The plot's pixels, [height, width, 3]."""
    folder.mkdir(exist_ok=True)
    plot_loss(str(folder), rows, r"2M parameters, runs/$a_{b$ \\frac{")
    with PIL_IMAGE.open(folder / "loss.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def blue(image: np.ndarray) -> np.ndarray:
    """Rows and columns of the pixels of the smoothed training loss (tab:blue)."""
    return np.argwhere(np.abs(image - np.array([31, 119, 180])).sum(-1) < 30)


def test_the_plot_shows_the_loss_fall_or_rise(tmp_path: Path) -> None:
    for name, slope in (("falls", -0.05), ("rises", 0.05)):
        image = plot(tmp_path / name, run(slope=slope)[1:-2])
        assert image.shape[0] > 300
        assert image.shape[1] > 500
        line = blue(image)
        assert len(line) > 500, "far more than the legend's sample of it"
        steepness = np.polyfit(line[:, 1], line[:, 0], 1)[0]
        assert abs(steepness) > 0.1
        assert (steepness > 0) == (slope < 0), "rows of pixels count downwards"


def test_validation_and_learning_rate_are_in_the_plot(tmp_path: Path) -> None:
    without = plot(tmp_path, run()[1:-2])
    image = plot(tmp_path, run())
    orange = np.abs(image - np.array([255, 127, 14])).sum(-1) < 30
    assert orange.sum() > 50
    assert not (np.abs(without - np.array([255, 127, 14])).sum(-1) < 30).any()
    green = np.argwhere(np.abs(image - np.array([44, 160, 44])).sum(-1) < 30)
    assert len(green) > 50
    assert green[:, 0].min() > image.shape[0] / 2, "in the lower panel"


@pytest.mark.parametrize(
    "rows",
    [[], run()[:1], run()[1:2], [{"step": 1, "loss": math.inf, "learning_rate": 0.0}]],
    ids=["nothing", "one validation", "one step", "no number"],
)
def test_a_short_run_has_a_plot_too(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot(tmp_path, rows).shape[2] == 3


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_numbers_are_printed_short() -> None:
    assert [shown(value) for value in (0.5, 999_999.0, 7.8e214, -2e9, math.inf, math.nan)] == [
        "0.5000",
        "999999.0000",
        "7.800e+214",
        "-2.000e+09",
        "inf",
        "nan",
    ]
    assert shown(244.691, 2) == "244.69"
