"""SIGTERM (preemption) or Ctrl-C ends the run after the current step, with a checkpoint.

Python runs signal handlers between bytecodes, and a compilation blocks them for minutes, in which the user would see nothing
and press Ctrl-C again. So a thread reads each signal at once from the interpreter's wakeup pipe, and prints an answer. It also
ends the process if the main thread does not react to a second signal.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from pretrain_xla.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0
"""Seconds that the main thread has to react to a second signal before the process is ended."""


class StopSignal:
    """Context that records the first SIGTERM or SIGINT and answers it at once; a second one has its default effect.

    Only for runs of one process: several would have to agree on the last step, or wait for each other forever.

    Attributes:
        signal: the first signal's number, or None.

    Args:
        enabled: whether to listen.
        doing: returns what the run finishes first, for the answer, such as `finishing step 7 and saving`.
    """

    def __init__(self, *, enabled: bool, doing: Callable[[], str] = lambda: "stopping") -> None:
        self.signal: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._doing = doing
        self._previous: dict[int, Any] = {}
        self._heard: list[int] = []
        self._left = threading.Event()

    def __enter__(self) -> StopSignal:
        if self._enabled:
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._previous_pipe = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._record)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._left.set()
        if self._enabled:
            signal.set_wakeup_fd(self._previous_pipe)
            self._write.close()  # ends the thread
            self._thread.join()
            self._read.close()

    def leave(self, message: str) -> None:
        """End the run because of the signal.

        Raises:
            Interrupted: always; the command line exits with 128 + signal.
        """
        assert self.signal is not None
        raise Interrupted(message, self.signal)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _listen(self) -> None:
        while numbers := self._read.recv(1):
            if numbers[0] not in SIGNALS:
                continue
            self._heard.append(numbers[0])
            if len(self._heard) == 1:
                _say(f"{self._doing()}; again to leave at once")
            elif not self._left.wait(PATIENCE):
                _say("left at once; the same command continues from the newest checkpoint")
                os._exit(128 + numbers[0])


def _forget_pipe() -> None:
    """In a forked child: its signals must not reach the parent, which would take one Ctrl-C for two."""
    signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_pipe)


def _say(line: str) -> None:
    """Print to stderr, unbuffered: another thread may hold the buffer's lock, and a handler must not wait for it."""
    begin = "\n" if sys.stderr.isatty() else ""  # after the ^C on the terminal
    os.write(2, f"{begin}{line}\n".encode())
