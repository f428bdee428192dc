"""SIGTERM (preemption), SIGUSR1 (Slurm's notice) or Ctrl-C ends the run after the current step, with a checkpoint.

Where a run has several processes, one of them receiving a signal is enough: all agree on the step, stop there and save.
torch_xla's own preemption manager is not used: it listens to SIGTERM alone, takes it from everyone else, and needs a service
that aborts all processes when one ends.

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
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from pretrain_xla.errors import Interrupted
from pretrain_xla.runtime import Hosts
from pretrain_xla.train.stop_after import SUPERVISED_SINCE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 5.0
"""Seconds that the main thread has to react to a second signal before the process is ended."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", SUPERVISED_SINCE)
FORWARDED = 3.0
"""Seconds in which a launcher passes on a signal that its processes have received, too: the same request, not a second one."""


class StopSignal:
    """Context that records the first such signal and answers it at once; a second one has its default effect.

    Python lets only the main thread listen. In another thread the context only does what the other processes ask for.

    Args:
        hosts: the processes of the run.
        doing: returns what the run finishes first, for the answer, such as `finishing step 7 and saving`.
        launched: whether a launcher may pass on signals that this process has received itself. None: torchrun and `supervise`
            do, where the whole machine is asked to stop, as before a preemption.
    """

    def __init__(
        self, hosts: Hosts, doing: Callable[[], str] = lambda: "stopping", *, launched: bool | None = None
    ) -> None:
        self._hosts = hosts
        self._enabled = threading.current_thread() is threading.main_thread()
        self._doing = doing
        self._launched = any(name in os.environ for name in LAUNCHERS) if launched is None else launched
        self._previous: dict[int, Any] = {}
        self._heard: list[float] = []
        self._first: float | None = None
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

    def stops_here(self) -> bool:
        """Whether the run stops at this point; see `Hosts.stops_here`."""
        return self._hosts.stops_here()

    def leave(self, message: str) -> None:
        """End the run because of the signal. Only the first process prints the message.

        Raises:
            Interrupted: always; the command line exits with 128 + signal.
        """
        number = self._hosts.stopped_by
        assert number is not None
        raise Interrupted(message if self._hosts.is_first else "", number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._hosts.request_stop(number)
        if not self._launched:
            self._restore()
        elif self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > FORWARDED:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _listen(self) -> None:
        while numbers := self._read.recv(1):
            if numbers[0] not in SIGNALS:
                continue
            if self._heard and self._launched and time.monotonic() - self._heard[0] < FORWARDED:
                continue
            self._heard.append(time.monotonic())
            if len(self._heard) == 1:
                self._hosts.request_stop(
                    numbers[0]
                )  # the main thread may be in a compilation, and the others should know
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
