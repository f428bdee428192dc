"""`--stop-after`: end a run before a machine that is lent for a time ends it, as Slurm and Kaggle do.

The process sends itself the signal that a scheduler would send, SIGTERM, so that the run ends as with that: it finishes the
step, saves, and exits with status 143. The time counts from the start of the process, or of its supervisor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from pretrain_xla.config.duration import seconds_of

SUPERVISED_SINCE = "PRETRAIN_XLA_SUPERVISED_SINCE"
"""Environment variable: when the supervisor started, in seconds since 1970."""
_IMPORTED = time.time()


@contextlib.contextmanager
def stopping_after(duration: str | None) -> Iterator[None]:
    """Send this process SIGTERM when a time is over, unless the context was left before.

    Args:
        duration: such as `8h30m`. None means never.
    """
    if duration is None:
        yield
        return
    begin = float(os.environ.get(SUPERVISED_SINCE) or _IMPORTED)
    timer = threading.Timer(max(0.0, begin + seconds_of(duration) - time.time()), _stop, [duration])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stop(duration: str) -> None:
    os.write(2, f"{duration} are over (--stop-after)\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
