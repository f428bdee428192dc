"""TensorBoard and Weights & Biases. If one fails, the run warns and continues without it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted_tree
from pretrain_xla.system_faults import reason

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

    Raises:
        UserError: it is not installed or does not start (no login, no network, no such run).
    """

    def __init__(self, config: RunConfig, warn: Warn) -> None:
        self._interval, self._warn = config.wandb.wandb_logging_interval, warn
        self._run: Any = _start(config)
        self._left: Row | None = None  # the newest training row that was not sent

    def rows(self, rows: list[Row], kind: str) -> None:
        """Send rows; each has a `step`."""
        for row in rows:
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
        self._use(lambda run: run.log({f"{kind}/{name}": value for name, value in row.items()}, step=row["step"]))

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


def _draw(row: Row, kind: str, writer: Any) -> None:
    for name, value in row.items():
        if name != "step":
            writer.add_scalar(f"{kind}/{name}", value, row["step"])


def _start(config: RunConfig) -> Any:
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
            id=settings.wandb_resume_id,
            resume="must" if settings.wandb_resume_id else None,
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
