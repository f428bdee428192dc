"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases, and the console.

`metrics.jsonl` is the record: one line a step, one a validation and one an evaluation. It is safe over restarts: when a run
resumes at step s, lines of later steps (from a run that died after its last checkpoint) are dropped, and so is a last line that
was cut off.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted_tree

Row = dict[str, Any]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, which has neither NaN nor Infinity: null for what is no finite number."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str) -> list[Row]:
    """Lines of a `metrics.jsonl`, NaN where they have null; one that was cut off in writing is left out."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or "step" not in row:
                continue  # a line that was cut off can be a number as well
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def metrics_path(run_dir: str) -> str:
    """Where a run's rows are."""
    return os.path.join(run_dir, "metrics.jsonl")


class MetricLog:
    """Appends rows to `metrics.jsonl` and passes them to TensorBoard and Weights & Biases. Only the main process has one."""

    def __init__(self, config: RunConfig, resumed_step: int) -> None:
        self.path = metrics_path(config.run_dir)
        self._config = config
        kept: list[Row] = []
        if resumed_step and os.path.exists(self.path):
            kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step]
        temporary = self.path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down may be left with neither the old file nor the new
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run; see close)
        self._tensorboard: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(config.run_dir, purge_step=resumed_step + 1 if resumed_step else None)
        self._wandb = _start_wandb(config) if config.logging.wandb_logging else None

    def write(self, rows: list[Row], *, kind: str) -> None:
        """Record rows of one kind (`train`, `validation` or `evaluation`); each has a `step`."""
        for row in rows:
            self._file.write(to_json(row) + "\n")
            if self._tensorboard is not None:
                for name, value in row.items():
                    if name != "step":
                        self._tensorboard.add_scalar(f"{kind}/{name}", value, row["step"])
            if self._wandb is not None and (
                kind != "train" or row["step"] % self._config.logging.wandb_logging_interval == 0
            ):
                self._wandb.log({f"{kind}/{name}": value for name, value in row.items()}, step=row["step"])
        self._file.flush()

    def write_sample(self, step: int, text: str) -> None:
        """Record what the model wrote after `step`, in `samples.txt` and as TensorBoard text."""
        with open(os.path.join(self._config.run_dir, "samples.txt"), "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")
        if self._tensorboard is not None:
            self._tensorboard.add_text("sample", text, step)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: RunConfig) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            "wandb_logging needs Weights & Biases: pip install wandb, or leave out --wandb-logging"
        ) from None
    logging = config.logging
    return wandb.init(
        project=logging.wandb_project,
        name=logging.wandb_name,
        config=redacted_tree(config.model_dump(mode="json")),
        notes=logging.wandb_notes,
        tags=list(logging.wandb_tags),
        id=logging.wandb_resume_id,
        resume="must" if logging.wandb_resume_id else None,
    )
