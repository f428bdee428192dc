"""The processes of one run, and how they agree: where it begins, when it stops, and what failed.

Everything goes through one key-value store of `torch.distributed` (a `TCPStore`), which the first process or torchrun serves.
It has nothing to do with the devices: it adds no work to the step and never waits for it. Collectives of a gloo or NCCL group
would not do: the first one that a lost process breaks makes the group unusable, while the others still have to agree on what
to say. Here every wait has its own deadline, and threads can use it beside the main one.

`hosts_watch.py` is the thread that notices lost processes and requests to stop. `rendezvous.py` opens the store.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from pretrain_xla.errors import LOST, AnotherFailed, Interrupted, UserError
from pretrain_xla.runtime.hosts_watch import Failure, Watch
from pretrain_xla.system_faults import reason

DEADLINE = 600.0
"""Seconds that a process waits for the others at one point, if none is lost. They may differ by a download or a compilation."""

SAYS = 15.0
"""Seconds after which the first process says for whom it waits."""

BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Socket closed")
"""Words of errors that say that a connection to another process broke."""


class Hosts:
    """All processes of a run, as one of them sees them. This class is a run of one process, where everything is trivial.

    Values are numbers, strings, None, and lists and dicts of these: they travel as JSON, so that no peer can run code here.

    Attributes:
        index: of this process, from 0. It need not be the number that the devices have for it.
        count: processes of the run.
        machines: machines of the run.
        is_first: whether this process writes what is written once, and prints.
    """

    index = 0
    count = 1
    machines = 1

    def __init__(self) -> None:
        self._signal: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once, and prints."""
        return self.index == 0

    def gather(self, value: Any, what: str, seconds: float = DEADLINE) -> list[Any]:
        """The values of all processes, in their order, on every process.

        Args:
            value: of this process.
            what: what is agreed on, for messages, such as `the first step`. Calls with the same words must come in the same
                order on every process; calls with other words may come at any time, from any thread.
            seconds: how long to wait for the others.

        Raises:
            AnotherFailed: another process failed or was lost, or did not come in time.
        """
        return [value]

    def first(self, value: Any, what: str, seconds: float = DEADLINE) -> Any:
        """The first process's value, on every process; the others' are ignored. Otherwise as `gather`."""
        return self.gather(value if self.is_first else None, what, seconds)[0]

    def equal(self, value: Any, what: str, seconds: float = DEADLINE) -> bool:
        """Whether all processes have the same value. Otherwise as `gather`."""
        values = self.gather(value, what, seconds)
        return all(other == values[0] for other in values)

    def minimum(self, value: int, what: str, seconds: float = DEADLINE) -> int:
        """The smallest of all processes' values. Otherwise as `gather`."""
        return min(self.gather(value, what, seconds))

    def barrier(self, what: str, seconds: float = DEADLINE) -> None:
        """Wait until every process has come here. Otherwise as `gather`."""
        self.gather(None, what, seconds)

    def devices_are_open(self) -> None:
        """Wait until every process has opened its devices. From here on a silent process is lost.

        Opening may stop all threads of a process, for as long as it waits for the other hosts of a TPU. Otherwise as `gather`.
        """

    def name(self, index: int) -> str:
        """A process for messages, such as `process 1 of 4 (pid 123 on host b)`."""
        return "this process"

    def request_stop(self, number: int) -> None:
        """Ask for all processes to stop because of a signal. May be called from a signal handler or any thread."""
        self._signal = self._signal or number

    @property
    def stopped_by(self) -> int | None:
        """The signal that the run stops for, as far as this process knows. None means that nothing was asked for."""
        return self._signal

    def stops_here(self) -> bool:
        """Whether the run stops at this point, on every process alike. Only the main thread may call it.

        Every process calls it at the same points of the program, in the same order, such as after each step. It returns at once
        unless a stop was asked for; then it may wait until all have agreed on the point.

        Raises:
            AnotherFailed: another process failed or was lost.
        """
        return self._signal is not None

    def fail(self, message: str, status: int, *, stacks: bool = False) -> None:
        """Tell the other processes that this one ends with an error, so that they end with the same message.

        stacks: those that do not follow, because they hang as well, print the stack of each of their threads.
        """

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Tell the others how this process ends. May be entered within itself, so that they are told before anything is closed.

        Raises:
            AnotherFailed: in place of an error that is only what another process's end looks like from here.
        """
        return False

    def close(self) -> None:
        """Leave together: wait for the others, unless one has failed."""


class JoinedHosts(Hosts):
    """One of several processes, joined through a store.

    Args:
        store: a `TCPStore`, or one behind a `PrefixStore`, where all processes meet; its timeout bounds each access.
        index, count, machines: as in `Hosts`.
        silence: seconds without a sign of life after which a process is lost.
        serves: whether the store's server is in this process, which must then leave last.
        launcher: pid of the launcher, with which this process must end. None means that there is none.
        seconds: how long to wait for the others to come.

    Raises:
        UserError: a process with this index is already there.
        AnotherFailed: the others did not come.
    """

    def __init__(
        self,
        store: Any,
        index: int,
        count: int,
        machines: int,
        silence: float,
        *,
        serves: bool = False,
        launcher: int | None = None,
        seconds: float = DEADLINE,
    ) -> None:
        super().__init__()
        self._store, self._serves = store, serves
        self.index, self.count, self.machines = index, count, machines
        self._calls: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._closed = self._told = False
        self._main = threading.current_thread()
        me = f"pid {os.getpid()} on {socket.gethostname()}"
        if (other := _text(store.compare_set(f"joined/{index}", "", me))) != me:
            raise UserError(
                f"process {index} of {count} is there already ({other}): an earlier run has not ended there; end it, or name "
                "another port in MASTER_PORT"
            )
        store.set(f"beat/{index}", "0")
        self._names: list[str] = []
        self._watch = Watch(store.clone(), index, count, silence, self.name, serves=serves, launcher=launcher)
        self._watch.start()
        self._names = self.gather(me, "the start", seconds)

    def name(self, index: int) -> str:
        """See `Hosts.name`."""
        return f"process {index} of {self.count}" + (f" ({self._names[index]})" if self._names else "")

    def gather(self, value: Any, what: str, seconds: float = DEADLINE) -> list[Any]:
        """See `Hosts.gather`."""
        with self._counting:
            self._calls[what] += 1
            key = f"gather/{what}/{self._calls[what]}"
        keys = [f"{key}/{index}" for index in range(self.count)]
        try:
            self._store.set(keys[self.index], json.dumps(value))
            if self._store.add(f"{key}/arrived", 1) == self.count:
                self._store.set(f"{key}/all", "")
            self._wait(f"{key}/all", keys, what, seconds)
            return [json.loads(one) for one in self._store.multi_get(keys)]
        except dist.DistError as error:
            raise self._broken(error) from error

    def _wait(self, complete: str, keys: list[str], what: str, seconds: float) -> None:
        began, pause, told = time.monotonic(), 0.001, False
        while not self._store.check([complete]):
            self._raise_failure()
            waited = time.monotonic() - began
            if self.is_first and not told and waited > min(SAYS, seconds / 2):
                told = True
                _note(f"waiting for {self._late(keys)} to come to {what}, for up to {seconds:.0f} s")
            if waited > seconds:
                text = f"{self._late(keys)} did not come to {what} within {seconds:.0f} s"
                self.fail(text, LOST)
                raise self._error(Failure(text, LOST, self.index))
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def _late(self, keys: list[str]) -> str:
        return ", ".join(self.name(index) for index, key in enumerate(keys) if not self._store.check([key]))

    def _raise_failure(self) -> None:
        if (failure := self._watch.failure) is not None:
            raise self._error(failure)

    def _error(self, failure: Failure) -> AnotherFailed:
        error = AnotherFailed(failure.message, failure.status)
        if threading.current_thread() is self._main:  # another thread's error may not reach the user
            self._watch.raised = error
        return error

    def devices_are_open(self) -> None:
        """See `Hosts.devices_are_open`."""
        self.barrier("opening the devices")
        self._watch.is_strict = True

    def store(self) -> dist.Store:
        """Another connection to the store, for a process group of `torch.distributed`."""
        return dist.PrefixStore("group", self._store.clone())

    def request_stop(self, number: int) -> None:
        """See `Hosts.request_stop`."""
        self._watch.request_stop(number)

    @property
    def stopped_by(self) -> int | None:
        """See `Hosts.stopped_by`."""
        return self._watch.signal

    def stops_here(self) -> bool:
        """See `Hosts.stops_here`."""
        stops = self._watch.stops_here()
        while stops is None:
            self._raise_failure()
            time.sleep(0.01)
            stops = self._watch.agreed_here()
        if stops is False:
            self._raise_failure()
        return stops

    def fail(self, message: str, status: int, *, stacks: bool = False) -> None:
        """See `Hosts.fail`."""
        if self._told or self._closed:
            return
        self._told = True
        self._watch.tell(Failure(message, status, self.index, stacks))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """See `Hosts.__exit__`."""
        if error is None or self._told or isinstance(error, AnotherFailed | Interrupted):
            return False
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return False
        if isinstance(error, UserError):
            self.fail(f"{self.name(self.index)}: {error}", 2)
        elif isinstance(error, KeyboardInterrupt):
            self.fail(f"{self.name(self.index)} was interrupted", 128 + signal.SIGINT)
        else:
            if _is_broken_connection(error):
                raise self._broken(error) from error
            self.fail(f"{self.name(self.index)}: {type(error).__name__}: {reason(error)}", 1)
        return False

    def _broken(self, error: BaseException) -> AnotherFailed:
        """The error for a broken connection: what the other process said, or else which one is silent."""
        failure = self._watch.find_cause(reason(error))
        return self._error(failure)

    def close(self) -> None:
        """See `Hosts.close`."""
        if self._closed:
            return
        if not self._told and self._watch.failure is None:
            self.barrier("the end")
        self._closed = True
        self._watch.leave()


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(words in str(error) for words in BROKEN)
    )


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
