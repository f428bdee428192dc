"""Reading, with retries, from buckets, the Hub and web servers.

Each request has its own time limit, so a stalled one is given up while others go on. `retries` says which errors are retried,
and for how long. Concurrent requests run in daemon threads, which never keep a process from ending.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem, sync

from pretrain_xla.storage import retries
from pretrain_xla.storage.files import is_local, url
from pretrain_xla.storage.retries import with_retries

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS_AT_A_TIME = 16
logging.getLogger("gcsfs").addHandler(
    logging.NullHandler()
)  # otherwise it prints a stack trace for each error that it raises


class TruncatedError(OSError):
    """A body shorter than the requested range."""


def call(fs: Any, method: str, path: str, **options: Any) -> Any:
    """`fs.method(path, ...)`, with retries unless the file system is local.

    Raises:
        FileNotFoundError: there is no such file or folder.
        UserError: it cannot be read for another reason, or not within `RETRY_LIMITS`.
    """
    if is_local(fs):
        return getattr(fs, method)(path, **options)
    return with_retries(url(fs, path), lambda: _once(fs, method, path, **options))


def read_range(fs: Any, path: str, begin: int, end: int) -> bytes:
    """The bytes from `begin` up to `end` of a file; it must have as many.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or not within `RETRY_LIMITS`.
    """

    def attempt() -> bytes:
        data: bytes = _once(fs, "cat_file", path, start=begin, end=end)
        if len(data) > end - begin:  # the server ignores ranges, and sent the whole file
            data = data[begin:end]
        if len(data) != end - begin:
            raise TruncatedError(f"{len(data):,} of {end - begin:,} requested bytes came")
        return data

    return attempt() if is_local(fs) else with_retries(url(fs, path), attempt)


def concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int = REQUESTS_AT_A_TIME
) -> list[Result]:
    """`function` of each item, some at a time. The first error is raised, and no more items are started."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    numbers, lock = iter(range(len(items))), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = function(items[number])
            except BaseException as error:  # any error is passed to the caller
                errors.append(error)

    workers = [threading.Thread(target=work, name="remote", daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def _once(fs: Any, method: str, path: str, **options: Any) -> Any:
    """One attempt, within `RETRY_LIMITS.attempt_seconds` if the file system has a time limit to set."""
    if not isinstance(fs, AsyncFileSystem) or fs.asynchronous:
        return getattr(fs, method)(path, **options)

    async def bounded() -> Any:
        return await asyncio.wait_for(getattr(fs, f"_{method}")(path, **options), retries.RETRY_LIMITS.attempt_seconds)

    return sync(fs.loop, bounded)
