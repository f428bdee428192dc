"""Runs the user's own gcloud as a program, and says what its errors mean.

Errors are told apart by their published texts; gcloud's exit status is 1 for all of them. Calls run in a session of their own:
Ctrl-C reaches the launcher alone, which then decides what becomes of a call that is under way.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.timing import Timing

INSTALL = "https://cloud.google.com/sdk/docs/install"
TRIES = 5


class Kind(enum.Enum):
    """What an error means for a launch."""

    STOCKOUT = "no capacity in that zone now: another zone, or later"
    QUOTA = "the project may not have so many there"
    NOT_OFFERED = "that zone does not have such slices"
    PERMISSION = "the account may not do that"
    NOT_FOUND = "there is no such thing"
    EXISTS = "there is one already"
    LOGIN = "nobody is logged in"
    TRANSIENT = "it passes by itself"
    UNREACHABLE = "a worker does not answer"
    REMOTE = "the command failed on the worker"
    OTHER = "unknown"


_TEXTS: tuple[tuple[Kind, str], ...] = (
    (
        Kind.LOGIN,
        r"do not currently have an active account|reauthentication (failed|required|is needed)|invalid_grant"
        r"|refreshing your current auth tokens|gcloud auth login",
    ),
    (
        Kind.QUOTA,
        r"quota (limit )?'?[\w-]+'? (has been )?(exceeded|exhausted)|quota exceeded|exceeds? quota|quota metric",
    ),
    (
        Kind.STOCKOUT,
        r"no more capacity|insufficient (reserved )?capacity|stockout|resource_pool_exhausted|does not have enough resources"
        r"|currently unavailable in the|not enough resources|no available capacity",
    ),
    (
        Kind.NOT_OFFERED,
        r"was not found in zone|could not be found in the zonal accelerator|is not supported for accelerator type"
        r"|permission denied on 'locations/|location_policy_violated|requested zone .* is not supported"
        r"|accelerator type .* (is not|not) (available|supported)",
    ),
    (Kind.EXISTS, r"already[ _]exists"),
    (
        Kind.UNREACHABLE,
        r"exited with return code \[?255|connection (timed out|refused|closed|reset)|no route to host|broken pipe"
        r"|connection to \S+ closed|kex_exchange|host is down|no external ip|this tpu has (terminal )?state",
    ),
    (Kind.NOT_FOUND, r"not[ _]found|does not exist|could not be found|matched no objects|not find existing|\b404\b"),
    (
        Kind.TRANSIENT,
        r"unavailable|internal error|deadline[ _]exceeded|try again|temporarily|timed? ?out|problem connecting|\b50[0234]\b"
        r"|rate ?limit|too many requests|\b429\b|aborted|conflict|network is unreachable|name resolution|connection aborted",
    ),
    (
        Kind.PERMISSION,
        r"permission[ _]denied|forbidden|\b403\b|required '?\S+'? permission|has not been used in project|disabled",
    ),
)
_REMOTE = re.compile(
    r"exited with return code \[?(\d+)|Command execution on worker \d+ failed with (?:return code|exit status) (\d+)"
)
_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _TEXTS)


def classify(text: str) -> Kind:
    """What an error of gcloud means, by its text."""
    if (status := _REMOTE.search(text)) is not None:  # before that, the command may have written anything
        return Kind.UNREACHABLE if "255" in status.groups() else Kind.REMOTE
    return next((kind for kind, pattern in _PATTERNS if pattern.search(text)), Kind.OTHER)


class GcloudError(Exception):
    """A call that failed. kind: what it means. text: gcloud's own words, in one line."""

    def __init__(self, kind: Kind, text: str, status: int) -> None:
        super().__init__(text)
        self.kind, self.text, self.status = kind, text, status


def error_line(stderr: str, status: int) -> str:
    """The error in what gcloud wrote to stderr, in one line; of a command on a worker, its last words and status."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    if _REMOTE.search(plain):
        return " ".join(plain.split())[-500:]
    found = re.search(r"ERROR: (?:\(gcloud[\w.-]*\) )?(.*)", plain, re.DOTALL)
    text = " ".join((found.group(1) if found else plain).split())
    return text[-500:] if not found else text[:500] or f"status {status}"


class Gcloud:
    """The program, found on PATH.

    Raises:
        UserError: it is not there.
    """

    def __init__(self, clock: Clock, timing: Timing) -> None:
        path = shutil.which("gcloud")
        if path is None:
            raise UserError(
                f"gcloud is not on PATH: install Google Cloud's command line ({INSTALL}), then: gcloud auth login"
            )
        self._path, self._clock, self._timing = path, clock, timing
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, call: Sequence[str], stdin: bytes = b"", seconds: float | None = None) -> str:
        """Run a call once; returns what it printed, as text; see `content`."""
        return self.content(call, stdin, seconds).decode("utf-8", "replace")

    def content(self, call: Sequence[str], stdin: bytes = b"", seconds: float | None = None) -> bytes:
        """Run a call once; returns what it printed.

        Raises:
            GcloudError: it failed, or took too long.
            UserError: nobody is logged in.
        """
        limit = seconds or self._timing.call
        process = self._start(call, subprocess.PIPE)
        try:
            out, err = process.communicate(stdin, timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
            raise GcloudError(Kind.TRANSIENT, f"{_named(call)} did not end within {limit:.0f} s", -1) from None
        except BaseException:
            try:
                if "create" in call:  # what it asks for may come all the same: then it must be known
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=limit)
            finally:
                _end(process)
            raise
        if process.returncode:
            raise _failed(call, err.decode("utf-8", "replace"), process.returncode)
        return out

    def patiently(self, call: Sequence[str], stdin: bytes = b"", seconds: float | None = None) -> bytes:
        """The same, tried again after errors that pass by themselves."""
        pause = self._timing.retry
        for attempt in range(TRIES):
            try:
                return self.content(call, stdin, seconds)
            except GcloudError as error:
                if error.kind is not Kind.TRANSIENT or attempt == TRIES - 1:
                    raise
            self._clock.sleep(pause)
            pause = min(2 * pause, 60.0)
        raise AssertionError

    def json(self, call: Sequence[str]) -> Any:
        """What a call prints as JSON.

        Raises:
            GcloudError: it failed, or printed something else.
        """
        text = self.patiently(call).decode("utf-8", "replace")
        try:
            return json.loads(text)
        except ValueError:
            raise GcloudError(Kind.OTHER, f"{_named(call)} did not print JSON: {text[:200]!r}", 0) from None

    def lines(self, call: Sequence[str], silence: float) -> Iterator[bytes]:
        """The lines that a call prints, as they come.

        Raises:
            GcloudError: it failed, or was silent for that many seconds.
        """
        process = self._start(call, subprocess.DEVNULL)
        try:
            yield from _lines(call, process, silence)
        finally:
            _end(process)

    def end_all(self) -> None:
        """End the calls that other threads wait for."""
        for process in tuple(self._running):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def here(self, call: Sequence[str]) -> int:
        """Run a call on the user's terminal; returns its status."""
        return subprocess.call([self._path, *call])

    def _start(self, call: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [self._path, *call],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        )
        self._running = {one for one in self._running if one.poll() is None} | {process}
        return process


def _lines(call: Sequence[str], process: subprocess.Popen[bytes], silence: float) -> Iterator[bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    kept, errors, last = b"", bytearray(), time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(timeout=min(silence, 1.0))
            if not ready and time.monotonic() - last > silence:
                raise GcloudError(Kind.UNREACHABLE, f"nothing came for {silence:.0f} s", -1)
            for key, _ in ready:
                part = os.read(key.fd, 2**16)
                if not part:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    errors += part
                else:
                    last = time.monotonic()
                    *whole, kept = (kept + part).split(b"\n")
                    yield from whole
    if process.wait():
        raise _failed(call, errors.decode("utf-8", "replace"), process.returncode)


def _failed(call: Sequence[str], err: str, status: int) -> GcloudError | UserError:
    text = error_line(err, status)
    kind = classify(err)
    if "ssh" in call and "ERROR: (gcloud" not in err:  # gcloud passes on the status of the command
        kind = Kind.UNREACHABLE if status == 255 else Kind.REMOTE
    if kind is Kind.LOGIN:
        return UserError(
            f"gcloud has no valid login ({text[:200]}): run `gcloud auth login`, and give the same command again"
        )
    return GcloudError(kind, text, status)


def _named(call: Sequence[str]) -> str:
    return "gcloud " + " ".join(word for word in call if not word.startswith("-"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a call and what it started; its pipes are closed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
