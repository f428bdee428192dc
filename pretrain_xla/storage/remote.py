"""Reading, with retries, from buckets, the Hub and web servers.

Each request has its own time limit, so a stalled one is given up while others go on. A transient error (429, 5xx, a timeout, a
broken connection, a body that is too short) is retried after 0.5, 1, 2, ... 16 seconds plus a random time, until
`RetryLimits.give_up_seconds` after the first failure; then the error names the URL. A permanent error (no such file, no
permission, no credentials) is not retried. Concurrent requests run in daemon threads, which never keep a process from ending.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from fsspec.asyn import AsyncFileSystem, sync

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import is_local, url

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS_AT_A_TIME = 16
_NO_USE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    ImportError,
)
logging.getLogger("gcsfs").addHandler(
    logging.NullHandler()
)  # otherwise it prints a stack trace for each error that it raises


@dataclass(frozen=True)
class RetryLimits:
    """How long a remote read may take."""

    attempt_seconds: float = 45.0  # gcsfs makes six attempts of its own within 35
    """A request that takes longer is given up."""
    give_up_seconds: float = 120.0
    """No new attempt starts this long after the first failure."""
    first_delay: float = 0.5
    longest_delay: float = 16.0


RETRY_LIMITS = RetryLimits()


class TruncatedError(OSError):
    """A body shorter than the requested range."""


class RefusedError(UserError):
    """A permanent error: another attempt would fail, too."""


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
        return await asyncio.wait_for(getattr(fs, f"_{method}")(path, **options), RETRY_LIMITS.attempt_seconds)

    return sync(fs.loop, bounded)


def with_retries(where: str, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, retried after transient errors.

    Raises:
        FileNotFoundError: from the attempt.
        UserError: it fails permanently, or for longer than `RETRY_LIMITS`.
    """
    failures, first_failure, delay = 0, 0.0, RETRY_LIMITS.first_delay
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except Exception as error:
            failures += 1
            now = time.monotonic()
            first_failure = first_failure if failures > 1 else now
            if not _is_transient(error):
                raise RefusedError(f"{where}: cannot be read: {describe(error)}") from None
            if now - first_failure + delay > RETRY_LIMITS.give_up_seconds:
                raise UserError(
                    f"{where}: cannot be read: {describe(error)}; gave up after {failures} attempts in "
                    f"{now - first_failure:.0f} s: check the network and the bucket, then start again"
                ) from None
        time.sleep(delay * random.uniform(0.8, 1.2))
        delay = min(2 * delay, RETRY_LIMITS.longest_delay)


def _status(error: BaseException | None) -> int | None:
    """HTTP status of an error of aiohttp, gcsfs, botocore, requests or httpx. None means that it has none."""
    while error is not None and not isinstance(
        error, aiohttp.ClientPayloadError
    ):  # its cause is a 400 that aiohttp invents
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None)
        for candidate in (found, getattr(error, "status", None), getattr(error, "code", None)):
            if isinstance(candidate, int | str) and str(candidate).isdigit():
                return int(candidate)
        error = error.__cause__
    return None


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    if status is not None and status >= 400:
        return status in (408, 425, 429) or status >= 500
    # gcsfs turns a 403 into an OSError without a number.
    refused = str(error).startswith("Forbidden") or "credential" in type(error).__name__.lower()
    return not refused and not isinstance(error, _NO_USE)


def describe(error: BaseException) -> str:
    """An error of any library, shortened to one line, with its HTTP status if it has one."""
    status = _status(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        text = f"no answer within {RETRY_LIMITS.attempt_seconds:g} s"
    return f"{f'status {status}, ' if status and str(status) not in text else ''}{text[:200]}"
