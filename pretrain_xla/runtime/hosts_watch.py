"""A thread of each process that tells the others that it lives, and notices what they tell: failures and requests to stop.

The main thread may be anywhere: in a compilation, in a collective that waits for a process that is gone, or stopped by a
debugger. So this thread ends the process itself if the main thread does not follow within a few seconds. It holds no lock while
it accesses the store. A second thread watches the first, which hangs if the server of the store is stopped.

Keys of the store: `beat/<index>` a number that grows; `failed` the first failure; `heard` how many have seen it; `stop` the
signal that was received, and by whom; `stop/<index>` how far that process had come; `left` how many have ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from pretrain_xla.errors import LOST, AnotherFailed

FOLLOWS = 5.0
"""Seconds that the main thread has to end the process by itself after a failure."""

WINDS_UP = 30.0
"""The same after a failure of its own: it may still be writing a checkpoint."""

LENIENT = 10
"""Factor on the silence that is allowed until every process has opened its devices."""


@dataclass(frozen=True)
class Failure:
    """Why the run ends. message: one line. status: exit status. index: process that failed, or that was lost. stacks: the run
    hangs, so that the stacks of the threads say where."""

    message: str
    status: int
    index: int
    stacks: bool = False


class Watch:
    """The signs of life of all processes, their failures and requests to stop.

    Args:
        store: this thread's own connection.
        index, count: this process, and how many there are.
        silence: seconds without a sign of life after which a process is lost.
        name: index → the process's name for messages.
        serves: whether the store's server is in this process.
        launcher: pid of the parent process with which this one must end. None means that there is none.
    """

    def __init__(
        self,
        store: Any,
        index: int,
        count: int,
        silence: float,
        name: Callable[[int], str],
        *,
        serves: bool,
        launcher: int | None,
    ) -> None:
        self._store, self._index, self._count, self._name = store, index, count, name
        self._strict_silence, self._serves, self._launcher = silence, serves, launcher
        self.is_strict = False
        self._beat = min(1.0, silence / 10)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._beats: list[bytes] = [b""] * count
        self._seen = [time.monotonic()] * count
        self._all_came = False
        self._round_began = time.monotonic()
        self._points = 0  # calls of `stops_here` that did not stop
        self._reported = False
        self._stop_at: int | None = None
        self._requested: int | None = None
        self.signal: int | None = None
        self.failure: Failure | None = None
        self.raised: AnotherFailed | None = None  # in the main thread
        self._is_own = False
        self._failed_at = 0.0

    def start(self) -> None:
        """Start both threads."""
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_the_watch, name="hosts-alarm", daemon=True).start()

    @property
    def _silence(self) -> float:
        return self._strict_silence * (1 if self.is_strict else LENIENT)

    def request_stop(self, number: int) -> None:
        """Ask all processes to stop. Safe in a signal handler: it only sets a value, which the thread finds."""
        self._requested = self._requested or number
        self.signal = self.signal or number

    def stops_here(self) -> bool | None:
        """The next of the points at which the run may stop. None means that it is not agreed yet: ask `agreed_here`."""
        with self._lock:
            if self._stop_at is None and self._reported:
                return None
            return self._pass()

    def agreed_here(self) -> bool | None:
        """Whether the run stops at the point of the last `stops_here`. None means that it is not agreed yet."""
        with self._lock:
            return None if self._stop_at is None else self._pass()

    def _pass(self) -> bool:
        if self._stop_at is not None and self._points + 1 >= self._stop_at:
            return True
        self._points += 1
        return False

    def tell(self, failure: Failure) -> Failure:
        """Publish a failure, and wait a moment until the others have seen it. Returns the one that was published first."""
        with contextlib.suppress(dist.DistError):  # the server is gone: the others notice that themselves
            text = json.dumps(asdict(failure))
            failure = Failure(**json.loads(self._store.compare_set("failed", "", text)))
        if self.failure is None:
            self._failed_at = time.monotonic()
            self.failure = failure
            self._is_own = True
        with contextlib.suppress(dist.DistError):
            self._wait_for_all("heard")
        return failure

    def find_cause(self, words: str) -> Failure:
        """After a connection broke: the failure that another process has published, or which process is silent."""
        suspected = threading.Event()
        deadline = time.monotonic() + max(4 * self._beat, 2.0)
        while self.failure is None and time.monotonic() < deadline:
            suspected.wait(self._beat / 4)
        if self.failure is not None:
            return self.failure
        silent = [index for index in range(self._count) if self._seconds_silent(index) > 2.5 * self._beat]
        who = " and ".join(map(self._name, silent)) or "another process"
        return self.tell(Failure(f"{who} is gone ({words})", LOST, silent[0] if silent else -1))

    def leave(self) -> None:
        """End the threads; the process that serves waits until the others have left."""
        self._ended.set()
        self._wake.set()
        self._thread.join(2 * self._beat)
        if self._thread.is_alive():
            return  # the server does not answer
        with contextlib.suppress(dist.DistError):
            self._store.add("left", 1)
            if self._serves:  # the others' connections end with it
                self._wait_for_all("left")

    def _wait_for_all(self, key: str) -> None:
        """Wait a moment until all processes that live have counted themselves under a key."""
        alive = [index for index in range(self._count) if self._seconds_silent(index) < self._silence / 2]
        deadline = time.monotonic() + 4 * self._beat + 1
        while time.monotonic() < deadline and self._store.add(key, 0) < len(alive):
            time.sleep(self._beat / 10)

    def _seconds_silent(self, index: int) -> float:
        return 0.0 if index == self._index else time.monotonic() - self._seen[index]

    def _run(self) -> None:
        number = 0
        try:
            while not self._ended.is_set():
                number += 1
                self._round(number)
                self._pause()
        except (dist.DistError, RuntimeError) as error:
            if self._ended.is_set():
                return
            if self._launcher is not None and os.getppid() != self._launcher:
                self._notice(self._launcher_gone())
            else:
                words = " ".join(str(error).split())[:100]
                gone = f"the connection to {self._name(0)} is gone ({words})"
                self._notice(Failure(gone, LOST, 0))
        if self.failure is not None:
            self._end_the_process()

    def _pause(self) -> None:
        """Until the next round: a moment if there is something to agree on."""
        until = time.monotonic() + (self._beat if self.signal is None or self._stop_at is not None else self._beat / 20)
        while time.monotonic() < until and not self._ended.is_set() and self.failure is None:
            time.sleep(min(0.05, self._beat / 10))
            if self._requested is not None and self._stop_at is None and not self._reported:
                return

    def _round(self, number: int) -> None:
        paused = time.monotonic() - self._round_began > self._silence / 2  # this process itself was stopped for a while
        self._round_began = time.monotonic()
        self._store.set(f"beat/{self._index}", str(number))
        keys = [f"beat/{index}" for index in range(self._count)]
        self._all_came = self._all_came or self._store.check(keys)
        beats = self._store.multi_get(keys) if self._all_came else self._beats
        for index, beat in enumerate(beats):
            if beat != self._beats[index] or paused or not self._all_came:
                self._seen[index] = time.monotonic()
        self._beats = beats
        if self._store.check(["failed"]):
            self._notice(Failure(**json.loads(self._store.get("failed"))))
            self._store.add("heard", 1)
            self._ended.set()
            return
        self._agree_on_stop()
        silent = [index for index in range(self._count) if self._seconds_silent(index) > self._silence]
        if self._launcher is not None and os.getppid() != self._launcher:
            self._fail(self._launcher_gone())
        elif silent:
            names = " and ".join(map(self._name, silent))
            self._fail(Failure(f"{names} has not answered for {self._silence:.0f} s", LOST, silent[0]))

    def _launcher_gone(self) -> Failure:
        return Failure(f"the launcher of {self._name(self._index)} is gone", LOST, self._index)

    def _agree_on_stop(self) -> None:
        """All processes report how far they have come, and wait at the next point; the run stops right after the farthest."""
        if self._stop_at is not None:
            return
        if self._requested is not None and not self._reported:
            self._store.compare_set("stop", "", json.dumps([self._requested, self._index]))
        if not self._reported:
            if not self._store.check(["stop"]):
                return
            self.signal = json.loads(self._store.get("stop"))[0]
            with self._lock:
                self._reported, points = True, self._points
            self._store.set(f"stop/{self._index}", str(points))
        keys = [f"stop/{index}" for index in range(self._count)]
        if self._store.check(keys):
            farthest = max(map(int, self._store.multi_get(keys)))
            with self._lock:
                self._stop_at = farthest + 1

    def _fail(self, failure: Failure) -> None:
        failure = Failure(**json.loads(self._store.compare_set("failed", "", json.dumps(asdict(failure)))))
        self._notice(failure)
        self._store.add("heard", 1)
        self._ended.set()

    def _notice(self, failure: Failure) -> None:
        if self.failure is None:
            self._failed_at = time.monotonic()
            self.failure = failure

    def _end_the_process(self) -> None:
        """Wait until the main thread has ended the process, and do it for it if it does not."""
        assert self.failure is not None
        if self._serves:  # the others read the failure from here
            with contextlib.suppress(dist.DistError, RuntimeError):
                while time.monotonic() < self._failed_at + 4 * self._beat and self._store.add("heard", 0) < self._count:
                    time.sleep(self._beat / 10)
        patience = WINDS_UP if self._is_own else FOLLOWS
        time.sleep(max(self._failed_at + patience - time.monotonic(), 0))
        end_now(self.failure, quiet=self._is_printed)

    @property
    def _is_printed(self) -> bool:
        return self.raised is not None and self.raised.printed

    def _watch_the_watch(self) -> None:
        """The server of the store is in a process that is stopped: the thread above hangs, and so does the main one."""
        last = resumed = time.monotonic()
        while not self._ended.wait(self._beat):
            now = time.monotonic()
            resumed = now if now - last > self._silence / 2 else resumed  # this process itself was stopped
            last = now
            if now - max(self._round_began, resumed) > self._silence:
                server = self._name(0) if self._launcher is None else "the launcher"
                failure = Failure(f"{server} has not answered for {self._silence:.0f} s", LOST, 0)
                self._notice(failure)
                time.sleep(FOLLOWS)
                end_now(failure, quiet=self._is_printed)


def end_now(failure: Failure, *, quiet: bool = False) -> Any:
    """End this process at once, whatever its threads are doing. quiet: the message has been printed."""
    if not quiet:
        os.write(2, f"error: {failure.message}\n".encode())
    if failure.stacks:
        faulthandler.dump_traceback(2, all_threads=True)
    os._exit(failure.status)
