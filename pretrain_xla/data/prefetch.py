"""Make items ready ahead of their use, in a background thread: reading and host-to-device copies hide behind the
step."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class _End:
    """What the thread hands over last: the error that stopped it, if one did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """An iterator over `make(start)`, ..., `make(stop - 1)`, each made ahead of its use by one thread.

    At most `depth` items are made and not yet taken: a bound on the memory, and the device memory, that they hold. An
    error in `make` is raised, itself, where its item would have come. Use it as a context manager, or call `close`;
    one that is forgotten is closed when it is collected or the interpreter exits, so the thread never keeps a process
    alive.

    Args:
        make: makes one item; called in the thread, with one number at a time, in order.
        start: first number.
        stop: number after the last.
        depth: items to keep ready, at least 1.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth}: at least one item has to be made ahead")
        self.seconds_waited = 0.0
        """Time that the consumer has spent waiting for items, the first one included."""
        self._items: SimpleQueue[T | _End] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._ended = False
        closing = threading.Event()
        # The thread must not hold `self`: then it could never be collected.
        arguments = (make, range(start, stop), self._items, self._room, closing)
        thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._close = weakref.finalize(self, _stop, thread, self._room, closing)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        begin = time.perf_counter()
        item = self._items.get()
        self.seconds_waited += time.perf_counter() - begin
        if not isinstance(item, _End):
            self._room.release()
            return item
        self.close()
        if isinstance(item.error, StopIteration):  # it would end the loop in silence
            raise RuntimeError(f"StopIteration while making an item: {item.error}") from item.error
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread, and wait for it: as long as the item that it is making takes. What was made is dropped."""
        self._ended = True
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(
    make: Callable[[int], T],
    numbers: range,
    items: SimpleQueue[T | _End],
    room: threading.Semaphore,
    closing: threading.Event,
) -> None:
    try:
        for number in numbers:
            room.acquire()
            if closing.is_set():
                break
            items.put(make(number))
        items.put(_End())
    except (
        BaseException
    ) as error:  # handed over whatever it is, KeyboardInterrupt too: a silent death would hang the run
        items.put(_End(error))


def _stop(thread: threading.Thread, room: threading.Semaphore, closing: threading.Event) -> None:
    closing.set()
    room.release()
    if thread is not threading.current_thread():  # collected inside `make`, by chance
        thread.join()
