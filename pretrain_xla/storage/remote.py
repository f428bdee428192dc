"""Reading from where a read can fail and be worth another try: buckets, the Hub, web servers.

Each request gets a time limit of its own, so that a stalled one is given up while others go on. What may pass (429, 5xx,
a timeout, a connection that breaks, a body that is too short) is tried again after 0.5, 1, 2, ... 16 seconds and a
little chance, until `Patience.give_up_seconds` have gone by since the first failure; then the error names the URL. What
will not pass (no such file, no permission, no credentials) is not tried again. Requests run side by side in daemon
threads, which never keep a process from ending.
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
logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # else it prints a stack trace for each error it raises


@dataclass(frozen=True)
class Patience:
    """How long one waits for a remote read."""

    attempt_seconds: float = 45.0  # gcsfs makes six attempts of its own within 35
    """A request that has not ended by then is given up."""
    give_up_seconds: float = 120.0
    """No new attempt begins so long after the first one failed."""
    first_delay: float = 0.5
    longest_delay: float = 16.0


PATIENCE = Patience()


class TruncatedError(OSError):
    """A body shorter than what was asked for."""


class RefusedError(UserError):
    """The other side said no, and would say so again."""


def call(fs: Any, method: str, path: str, **options: Any) -> Any:
    """`fs.method(path, ...)`, with patience where the file system is not this host's.

    Raises:
        FileNotFoundError: there is no such file or folder.
        UserError: it cannot be read, for another reason, or not within `PATIENCE`.
    """
    if is_local(fs):
        return getattr(fs, method)(path, **options)
    return patiently(url(fs, path), lambda: _once(fs, method, path, **options))


def read_range(fs: Any, path: str, begin: int, end: int) -> bytes:
    """The bytes from `begin` up to `end` of a file that has them.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or not within `PATIENCE`.
    """

    def attempt() -> bytes:
        data: bytes = _once(fs, "cat_file", path, start=begin, end=end)
        if len(data) > end - begin:  # the server does not know of ranges, and sent the file
            data = data[begin:end]
        if len(data) != end - begin:
            raise TruncatedError(f"{len(data):,} bytes came where {end - begin:,} were asked for")
        return data

    return attempt() if is_local(fs) else patiently(url(fs, path), attempt)


def concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int = REQUESTS_AT_A_TIME
) -> list[Result]:
    """`function` of each item, some at a time. The first error ends it: no more items are begun, and it is raised."""
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
            except BaseException as error:  # handed to the caller, whatever it is
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
    """One attempt, within `PATIENCE.attempt_seconds` where the file system lets one choose."""
    if not isinstance(fs, AsyncFileSystem) or fs.asynchronous:
        return getattr(fs, method)(path, **options)

    async def bounded() -> Any:
        return await asyncio.wait_for(getattr(fs, f"_{method}")(path, **options), PATIENCE.attempt_seconds)

    return sync(fs.loop, bounded)


def patiently(where: str, attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives, tried again while that may help.

    Raises:
        FileNotFoundError: from the attempt.
        UserError: it fails for another reason, or for longer than `PATIENCE`.
    """
    failures, first_failure, delay = 0, 0.0, PATIENCE.first_delay
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except Exception as error:
            failures += 1
            now = time.monotonic()
            first_failure = first_failure if failures > 1 else now
            if not _may_pass(error):
                raise RefusedError(f"{where}: cannot be read: {describe(error)}") from None
            if now - first_failure + delay > PATIENCE.give_up_seconds:
                raise UserError(
                    f"{where}: cannot be read: {describe(error)}; gave up after {failures} attempts in "
                    f"{now - first_failure:.0f} s: check the network and the bucket, then start again"
                ) from None
        time.sleep(delay * random.uniform(0.8, 1.2))
        delay = min(2 * delay, PATIENCE.longest_delay)


def _status(error: BaseException | None) -> int | None:
    """HTTP status behind an error of aiohttp, gcsfs, botocore, requests or httpx, where there is one."""
    while error is not None and not isinstance(error, aiohttp.ClientPayloadError):  # below it is a 400 of aiohttp's own
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


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None and status >= 400:
        return status in (408, 425, 429) or status >= 500
    # gcsfs makes an OSError without a number of a 403.
    refused = str(error).startswith("Forbidden") or "credential" in type(error).__name__.lower()
    return not refused and not isinstance(error, _NO_USE)


def describe(error: BaseException) -> str:
    """An error of whatever library in a few words on one line, with its HTTP status where it has one."""
    status = _status(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        text = f"no answer within {PATIENCE.attempt_seconds:g} s"
    return f"{f'status {status}, ' if status and str(status) not in text else ''}{text[:200]}"
