"""One piece of work at a time on a thread of its own, which is known to hang if it makes no progress.

The thread is a daemon: work that hangs, on a network disk that does not answer, must not keep the process from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE = 60.0
"""Seconds without progress after which work counts as hanging."""


class Hanging(Exception):
    """The work makes no progress."""


class Background:
    """A thread for one piece of work at a time.

    what: describes the present work, or the last one. patience: see `PATIENCE`.
    """

    def __init__(self, name: str, patience: float = PATIENCE) -> None:
        self.what = ""
        self.patience = patience
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._moved = 0.0

    def start(self, what: str, work: Callable[[], None]) -> None:
        """Begin a piece of work; the one before must have ended."""
        assert not self.busy

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by `wait`, in the thread that waits
                self._error = error

        self.what = what
        self.progress()
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Called by the work whenever it got on."""
        self._moved = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether work is under way, hanging or not."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def hangs(self) -> bool:
        """Whether work is under way that made no progress for a while."""
        return self.busy and time.monotonic() - self._moved > self.patience

    def wait(self) -> None:
        """Wait until the work has ended; its error is raised here, once.

        Raises:
            Hanging: it makes no progress. It stays under way.
        """
        while self._thread is not None:
            self._thread.join(timeout=min(self.patience / 4, 1.0))
            if not self._thread.is_alive():
                self._thread = None
            elif self.hangs:
                raise Hanging(f"{self.what} makes no progress for {self.patience:.0f} s")
        error, self._error = self._error, None
        if error is not None:
            raise error
