"""A watchdog: a run that stops making progress says where every thread is, and exits for its supervisor to start it again.

A step can hang for ever: a device that no longer answers, a collective that another host never joins, a bucket that never
replies. Nothing raises an error then. So a thread looks at when the loop last gave a sign of life. It runs while the others
wait in C++ for a device or the network, because such calls release Python's lock. A call that hangs and holds the lock is not
seen.

The other processes of a run are told, so that they say why at once, and each prints the stacks of its own threads.

Time in which the process itself was stopped (Ctrl-Z, SIGSTOP, a suspended machine) does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType

from pretrain_xla.errors import LOST
from pretrain_xla.runtime import Hosts

HUNG = LOST
"""Exit status, as after another process was lost: the same command can succeed again."""

TELLS = 10.0
"""Seconds to tell the other processes."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(label, total) → a context that yields a function of how much is done so far."""


def stacks_on_request() -> None:
    """From now on, SIGUSR2 prints the stack of every thread to stderr, and the run goes on; C code may hang meanwhile."""
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)


class Watchdog:
    """Context in which `beat` must be called at least every `seconds`, or the process ends.

    Args:
        seconds: None means that nothing is watched.
        doing: returns what the run is doing, for the report, such as `step 7`.
        hosts: the processes of the run. None means this one alone.
    """

    def __init__(self, seconds: float | None, doing: Callable[[], str], hosts: Hosts | None = None) -> None:
        self._seconds, self._doing, self._hosts = seconds, doing, hosts or Hosts()
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self.beat()

    def beat(self) -> None:
        """Sign of life: the loop has made progress."""
        self._last = time.monotonic()

    def beating(self, progress: Progress) -> Progress:
        """The same progress bar, each of whose advances is a sign of life."""

        @contextlib.contextmanager
        def watched(what: str, total: int) -> Iterator[Callable[[int], None]]:
            with progress(what, total) as advance:

                def beat_and_advance(done: int) -> None:
                    self.beat()
                    advance(done)

                yield beat_and_advance

        return watched

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        tick = min(seconds / 10, 5.0)
        looked = time.monotonic()
        while not self._left.wait(tick):
            now = time.monotonic()
            if now - looked > 3 * tick + 1.0:  # this process did not run
                self._last += now - looked
            looked = now
            if now - self._last > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        """Print every thread's stack and end the process at once: whatever is asked to end in order may hang, too."""
        what = f"{self._doing()} has made no progress for {seconds:g} s (--hang-timeout)"
        line = (
            f"{what}; the stack of every thread follows, and "
            f"the run ends with status {HUNG}; the same command continues from the newest checkpoint\n"
        )
        with contextlib.suppress(OSError):  # a closed terminal must not keep the process from ending
            sys.stdout.flush()
            os.write(2, line.encode())
            faulthandler.dump_traceback(2, all_threads=True)
        telling = threading.Thread(target=self._tell, args=(what,), name="telling", daemon=True)
        telling.start()  # it may hang, too
        telling.join(TELLS)
        os._exit(HUNG)

    def _tell(self, what: str) -> None:
        self._hosts.fail(f"{self._hosts.name(self._hosts.index)}: {what}", HUNG, stacks=True)
