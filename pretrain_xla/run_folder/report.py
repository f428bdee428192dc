"""`summary.json` and `loss.png`, written at the end of a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.metrics import Row, metrics_path, read_rows, rewrite, to_json
from pretrain_xla.system_faults import disk_fault


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Losses and rates of a whole run (restarts included) from its metric rows."""
    train = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    rates = [row["tokens_per_second"] for row in train if "tokens_per_second" in row]
    shares = [row["mfu"] for row in train if "mfu" in row]
    scores = [row for row in rows if any("/" in name for name in row)]
    finite = [row for row in valid if math.isfinite(row["valid_loss"])]
    best = min(finite, key=lambda row: row["valid_loss"], default=None)
    return {
        "first_train_loss": train[0]["loss"] if train else None,
        "last_train_loss": train[-1]["loss"] if train else None,
        "first_valid_loss": valid[0]["valid_loss"] if valid else None,
        "last_valid_loss": valid[-1]["valid_loss"] if valid else None,
        "best_valid_loss": best["valid_loss"] if best else None,
        "best_valid_step": best["step"] if best else None,
        "skipped_updates": sum(row.get("skipped", 0) for row in train) if train else None,
        "scores": {name: value for name, value in scores[-1].items() if name != "step"} if scores else None,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "mfu": statistics.median(shares) if shares else None,
    }


def write_report(run_dir: str, figures: dict[str, Any], warn: Callable[[str], None] = print) -> dict[str, Any]:
    """Write `loss.png` and `summary.json` of a run from its metrics and the given figures; returns the summary.

    The summary is written last: if it is missing, the same command writes both again. `warn` is called with a line if lines
    of the metrics are damaged.

    Raises:
        UserError: one of them cannot be written.
    """
    path = metrics_path(run_dir)
    rows, damaged = read_rows(path) if os.path.exists(path) else ([], [])
    if damaged:
        warn(f"{path}: {len(damaged):,} damaged lines are not in the summary, the first is line {damaged[0]}")
    summary = {**figures, **summarise(rows)}
    plot_loss(run_dir, rows, f"{summary['parameters'] / 1e6:.1f}M parameters, {run_dir}")
    write_summary(run_dir, summary)
    return summary


def write_summary(run_dir: str, summary: dict[str, Any]) -> None:
    """Write `summary.json` atomically.

    Raises:
        UserError: it cannot be written.
    """
    rewrite(os.path.join(run_dir, "summary.json"), [to_json(summary, indent=2) + "\n"])


def read_summary(run_dir: str) -> dict[str, Any]:
    """Content of the folder's `summary.json`; empty if it cannot be read."""
    try:
        with open(os.path.join(run_dir, "summary.json"), encoding="utf-8") as file:
            summary = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def summarised_steps(run_dir: str) -> int | None:
    """Number of steps in the folder's `summary.json`, or None if it cannot be read."""
    steps = read_summary(run_dir).get("steps")
    return steps if isinstance(steps, int) else None


def plot_loss(run_dir: str, rows: list[Row], title: str) -> None:
    """Plot training loss (raw and smoothed), validation loss and the learning rate into `loss.png`.

    Raises:
        UserError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    figure, (losses, rates) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    steps = [row["step"] for row in train]
    if train:
        values = [row["loss"] for row in train]
        losses.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
        losses.plot(steps, _smoothed(values), color="tab:blue", linewidth=1.5, label="training, smoothed")
        rates.plot(steps, [row.get("learning_rate", math.nan) for row in train], color="tab:green", linewidth=1.2)
    if valid:
        losses.plot(
            [row["step"] for row in valid],
            [row["valid_loss"] for row in valid],
            color="tab:orange",
            marker="o",
            markersize=4,
            label=f"validation, last {valid[-1]['valid_loss']:.3f}",
        )
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(title, parse_math=False)  # a folder may be called $x$
    losses.grid(alpha=0.3)
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    path = os.path.join(run_dir, "loss.png")
    try:
        figure.savefig(path + ".tmp", dpi=120, format="png")
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise UserError(f"{path} cannot be written: {disk_fault(error) or error.strerror or error}") from None
    finally:
        plt.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the run, bias-corrected."""
    keep = 1.0 - 1.0 / max(len(values) / 50, 2.0)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that overflows a float; NaN for NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def shown(value: float, digits: int = 4) -> str:
    """A score for display: with `digits` decimals, in scientific notation from a million on."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"
