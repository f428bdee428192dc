"""Being asked to stop: SIGTERM (a preempted machine) or Ctrl-C ends the run after the step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pretrain_xla.errors import Interrupted


class StopSignal:
    """While open, remembers the first SIGTERM or SIGINT; a second one takes its usual way.

    Only where one process makes up the run: several would have to agree on the step first, or wait for each other for ever.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.signal: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if self._enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def leave(self, message: str) -> None:
        """End the run the way the signal asks.

        Raises:
            Interrupted: always; the command line exits with 128 + signal.
        """
        assert self.signal is not None
        raise Interrupted(message, self.signal)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
