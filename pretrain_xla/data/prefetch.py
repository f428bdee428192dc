"""Prepares items ahead of use in background threads: reading and host-to-device copies overlap with the step."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
Raw = TypeVar("Raw")


class Prefetcher(Generic[T]):
    """An iterator over `make(start)`, ..., `make(stop - 1)`, each made ahead of use by a thread.

    At most `depth` items are finished or in progress and not yet taken, which bounds the host and device memory that they
    hold. They come in order, whichever is finished first. An error in `make` is raised in place of its item, and no later
    item is started. Use it as a context manager, or call `close`. Otherwise it is closed when it is garbage-collected or the
    interpreter exits, so the threads never keep a process alive.

    Args:
        make: makes one item; called in a thread, in order of the numbers if there is one thread.
        start: first number.
        stop: number after the last.
        depth: items to keep ready, at least 1.
        threads: how many make items; more than one if making is mostly waiting. At most `depth` have work.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int, threads: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth}: must be at least 1")
        self.seconds_waited = 0.0
        """Time that the consumer has waited for items, including the first one."""
        self._items: SimpleQueue[Future[T] | None] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._ended = False
        closing = threading.Event()
        # The threads must not refer to `self`, or it could never be garbage-collected.
        arguments = (make, iter(range(start, stop)), self._items, self._room, closing, threading.Lock())
        workers = [threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True) for _ in range(threads)]
        self._close = weakref.finalize(self, _stop, workers, self._room, closing)
        for worker in workers:
            worker.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        begin = time.perf_counter()
        item = self._items.get()
        error = item.exception() if item else None
        self.seconds_waited += time.perf_counter() - begin
        if item and error is None:
            self._room.release()
            return item.result()
        self.close()
        if isinstance(error, StopIteration):  # it would silently end the loop
            raise RuntimeError(f"StopIteration while making an item: {error}") from error
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the threads and wait until their current items are made. Items that were not taken are dropped."""
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
    numbers: Iterator[int],
    items: SimpleQueue[Future[T] | None],
    room: threading.Semaphore,
    closing: threading.Event,
    order: threading.Lock,
) -> None:
    while True:
        room.acquire()
        with order:  # take a number and its place in the queue together
            number = None if closing.is_set() else next(numbers, None)
            if number is None:
                items.put(None)
                room.release()  # so that the next thread ends, too
                return
            item: Future[T] = Future()
            items.put(item)
        try:
            item.set_result(make(number))
        except BaseException as error:  # any error is passed on: a thread that dies silently would hang the run
            closing.set()
            item.set_exception(error)


def _stop(workers: list[threading.Thread], room: threading.Semaphore, closing: threading.Event) -> None:
    closing.set()
    room.release()
    for worker in workers:
        if worker is not threading.current_thread():  # garbage-collected inside `make`
            worker.join()


@contextlib.contextmanager
def pipeline(
    read: Callable[[int], Raw], place: Callable[[Raw], T], start: int, stop: int, depth: int, threads: int
) -> Iterator[Prefetcher[T]]:
    """Items `place(read(number))`: read by `threads` threads, and placed by one, in order.

    Args:
        read: reads one item; safe to call from several threads.
        place: puts it where it is used.
        start: first number.
        stop: number after the last.
        depth: placed items to keep ready.
        threads: that read. If more than one, up to as many further items are kept that are read and not yet placed.
    """
    if threads == 1:
        with Prefetcher(lambda number: place(read(number)), start, stop, depth) as items:
            yield items
    else:
        with (
            Prefetcher(read, start, stop, threads, threads) as raw,
            Prefetcher(lambda _: place(next(raw)), start, stop, depth) as items,
        ):
            yield items
