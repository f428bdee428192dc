"""Which errors of a network are retried, and for how long; and one line that says so.

A transient error (429, 5xx, a timeout, a broken connection, a body that is too short) is retried after 0.5, 1, 2, ... 16
seconds, more or less, until `RetryLimits.give_up_seconds` after the first failure. Then the error names the URL. A permanent
error (no such file, no permission, no credentials) is not retried. Many requests fail together, so a line is logged once they
have failed for some seconds, and one when the first of them succeeds again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted

Result = TypeVar("Result")

logger = logging.getLogger(__name__)
_NO_USE = (
    FileNotFoundError,
    FileExistsError,
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


@dataclass(frozen=True)
class RetryLimits:
    """How long a remote read may take."""

    attempt_seconds: float = 45.0  # gcsfs makes six attempts of its own within 35
    """A request that takes longer is given up."""
    give_up_seconds: float = 120.0
    """No new attempt starts this long after the first failure."""
    first_delay: float = 0.5
    longest_delay: float = 16.0
    silent_seconds: float = 5.0
    """Failures for longer than this are logged."""


RETRY_LIMITS = RetryLimits()


class RefusedError(UserError):
    """A permanent error: another attempt would fail, too."""


class _Outage:
    """Failures of all requests, of which one line is logged at the beginning and one at the end."""

    def __init__(self) -> None:
        self._lock, self._since = threading.Lock(), 0.0

    def goes_on(self, where: str, since: float, reason: str) -> None:
        """Log the first failure that has lasted for some seconds."""
        with self._lock:
            if self._since or time.monotonic() - since < RETRY_LIMITS.silent_seconds:
                return
            self._since = since
        limit = RETRY_LIMITS.give_up_seconds
        logger.warning("%s: %s; trying again, for up to %.0f s", redacted(where), redacted(reason), limit)

    def ends(self, where: str, answered: bool) -> None:
        """Log the first answer afterwards. If there is none, and a request is given up, that error says so."""
        with self._lock:
            since, self._since = self._since, 0.0
        if since and answered:
            logger.warning("%s: answers again, after %.0f s", redacted(where), time.monotonic() - since)


_outage = _Outage()


def with_retries(where: str, attempt: Callable[[], Result], done: str = "read") -> Result:
    """The result of `attempt`, retried after transient errors.

    Args:
        where: URL, for messages.
        attempt: makes the request.
        done: what is being done, for messages: "read" or "written".

    Raises:
        FileNotFoundError: from the attempt.
        UserError: it fails permanently, or for longer than `RETRY_LIMITS`.
    """
    failures, first_failure, delay, begin = 0, 0.0, RETRY_LIMITS.first_delay, time.monotonic()
    while True:
        try:
            result = attempt()
            if failures:
                _outage.ends(where, answered=True)
            return result
        except FileNotFoundError:
            raise
        except Exception as error:
            failures += 1
            now = time.monotonic()
            first_failure = first_failure if failures > 1 else now
            if not _is_transient(error):
                fix = "; check the credentials, the permissions and the network" if done == "written" else ""
                raise RefusedError(f"{where}: cannot be {done}: {describe(error)}{fix}") from None
            if now - first_failure + delay > RETRY_LIMITS.give_up_seconds:
                _outage.ends(where, answered=False)
                raise UserError(
                    f"{where}: cannot be {done}: {describe(error)}; gave up after {failures} attempts in "
                    f"{now - first_failure:.0f} s: check the network and the bucket, then start again"
                ) from None
            _outage.goes_on(where, begin, describe(error))
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
    # gcsfs raises an OSError without a number for a 403.
    refused = str(error).startswith("Forbidden") or "credential" in type(error).__name__.lower()
    return not refused and not isinstance(error, _NO_USE)


def describe(error: BaseException) -> str:
    """An error of any library, shortened to one line, with its HTTP status if it has one."""
    status = _status(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        text = f"no answer within {RETRY_LIMITS.attempt_seconds:g} s"
    return f"{f'status {status}, ' if status and str(status) not in text else ''}{text[:200]}"
