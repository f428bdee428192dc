"""TensorBoard and Weights & Biases. If one fails, the run warns and continues without it."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted_tree
from pretrain_xla.system_faults import reason

WANDB_ID_FILE = "wandb_id"
Row = dict[str, Any]
Warn = Callable[[str], None]


class TensorBoard:
    """Scalars and texts as TensorBoard events; on resume, events after `resumed_step` are purged."""

    def __init__(self, config: RunConfig, resumed_step: int, warn: Warn) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _expect_failing_writers()
        self._warn = warn
        self._writer: Any = None
        # Without a checkpoint everything is purged, including the validation before the first step.
        purged = resumed_step + 1 if resumed_step else 0
        self._try(lambda: setattr(self, "_writer", SummaryWriter(config.run_dir, purge_step=purged)))

    def rows(self, rows: list[Row], kind: str) -> None:
        """Write rows; each has a `step`."""
        for row in rows:
            self._use(functools.partial(_draw, row, kind))

    def text(self, step: int, text: str) -> None:
        """Write a generated sample."""
        self._use(lambda writer: writer.add_text("sample", text, step))

    def flush(self) -> None:
        """Write what waits in memory."""
        self._use(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close."""
        self._use(lambda writer: writer.close())
        self._writer = None

    def _use(self, call: Callable[[Any], None]) -> None:
        if self._writer is not None:
            self._try(lambda: call(self._writer))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._writer = None
            self._warn(f"TensorBoard events cannot be written ({reason(error)}): the run continues without them")


class WandB:
    """Rows for Weights & Biases; of training, every `wandb_logging_interval` steps and the last one.

    A run that resumes continues the same W&B run, whose id is in the run's folder. W&B keeps what was sent before a kill, so
    rows up to the last one that it has are not sent again.

    Args:
        config: of the run.
        resumed_step: number of updates when the run starts. 0 means a new W&B run.
        warn: called with a line if it fails.

    Raises:
        UserError: it is not installed or does not start (no login, no network, no such run).
    """

    def __init__(self, config: RunConfig, resumed_step: int, warn: Warn) -> None:
        self._interval, self._warn = config.wandb.wandb_logging_interval, warn
        self._id_file = os.path.join(config.run_dir, WANDB_ID_FILE)
        known = _read_id(self._id_file) if resumed_step and config.wandb.wandb_resume_id is None else None
        self._run: Any = _start(config, known)
        self._new_id = None if known is not None else self._run.id  # is written with the first row
        self._left: Row | None = None  # the newest training row that was not sent
        self._sent: dict[str, int] = {}
        self._use(self._prepare)

    def _prepare(self, run: Any) -> None:
        for kind in ("train", "validation", "evaluation"):
            # An own axis: a validation that is made up for comes after rows of later steps.
            run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
            if isinstance(step := run.summary.get(f"{kind}/step"), int):
                self._sent[kind] = step

    def rows(self, rows: list[Row], kind: str) -> None:
        """Send rows; each has a `step`."""
        for row in rows:
            if row["step"] <= self._sent.get(kind, -1):
                continue
            if kind == "train" and row["step"] % self._interval:
                self._left = row
                continue
            self._left = None if kind == "train" else self._left
            self._send(row, kind)

    def close(self) -> None:
        """Send the last training row, so that no run is empty, and finish."""
        if self._left is not None:
            self._send(self._left, "train")
        self._use(lambda run: run.finish())
        self._run = None

    def _send(self, row: Row, kind: str) -> None:
        named = {f"{kind}/{name}": value for name, value in row.items()}
        self._use(lambda run: run.log(named, step=max(row["step"], run.step)))
        if self._new_id is not None and self._run is not None:
            with contextlib.suppress(OSError):  # the next start then makes a new W&B run
                pathlib.Path(self._id_file).write_text(f"{self._new_id}\n", encoding="utf-8")
            self._new_id = None

    def _use(self, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # of the network, the service or the client
            self._run = None
            self._warn(
                f"Weights & Biases failed ({reason(error)}): the run continues without it; metrics.jsonl has all rows"
            )


def _read_id(path: str) -> str | None:
    """The id of a run's W&B run. None means that none is known."""
    with contextlib.suppress(OSError, ValueError):
        text = pathlib.Path(path).read_text(encoding="utf-8").strip()
        return text if re.fullmatch(r"[\w.-]{1,128}", text) else None
    return None


def _draw(row: Row, kind: str, writer: Any) -> None:
    for name, value in row.items():
        if name != "step":
            writer.add_scalar(f"{kind}/{name}", value, row["step"])


def _start(config: RunConfig, known: str | None) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            "wandb_logging needs Weights & Biases: pip install wandb, or leave out --wandb-logging"
        ) from None
    settings = config.wandb
    try:
        return wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_name,
            config=redacted_tree(config.model_dump(mode="json")),
            notes=settings.wandb_notes,
            tags=list(settings.wandb_tags),
            id=settings.wandb_resume_id or known,
            resume="must" if settings.wandb_resume_id else "allow" if known else None,
        )
    except Exception as error:
        resume = f", check --wandb-resume-id {settings.wandb_resume_id}" if settings.wandb_resume_id else ""
        raise UserError(
            f"Weights & Biases does not start ({reason(error)}): run `wandb login` or set WANDB_API_KEY{resume}, set "
            "WANDB_MODE=offline to upload later, or leave out --wandb-logging"
        ) from error


def _expect_failing_writers() -> None:
    """TensorBoard's thread passes its error to our next call and also prints a traceback: suppress the traceback."""
    previous = threading.excepthook
    if getattr(previous, "leaves_out_tensorboard", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            previous(arguments)

    hook.leaves_out_tensorboard = True  # type: ignore[attr-defined]
    threading.excepthook = hook
