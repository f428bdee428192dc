"""Starts a run again whenever it ends before it is done: `python -m pretrain_xla supervise -- COMMAND`.

A run says by its exit status why it ended:

| status      | meaning                                                         | what happens                      |
|-------------|-----------------------------------------------------------------|-----------------------------------|
| 0           | done                                                            | ends                              |
| 2           | an error that the user can fix: a wrong flag, missing data      | ends if it came within a minute,  |
|             |                                                                 | or if the error before was equal  |
| 75          | it hung, or another process of the run was lost                 | starts again                      |
| 128 + n     | signal n or `--stop-after` asked it to stop, and it has saved   | ends                              |
| others      | a bug, or a signal that killed it (out of memory, for instance) | starts again                      |

The same command continues from the newest checkpoint. The pause before it doubles with each start, from five seconds to five
minutes. Runs that end within ten minutes, or with the same last line on stderr as the run before, are a crash loop if they come
`--max-restarts` times in a row. Then the supervisor ends with the status of the last run, and repeats that line. It passes
SIGTERM, SIGINT and SIGUSR1 on to the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from pretrain_xla.command_line import parse
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
FIXABLE_SECONDS = 60.0
"""A fixable error that comes later, such as a full disk or a bucket that failed for minutes, may be gone at the next start."""
HEALTHY_SECONDS = 600.0
"""A run that lasts longer than this is not part of a crash loop."""
GRACE = 30.0
"""Seconds that processes which the run left behind have to end."""
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FIXABLE = 2
_KEPT = 4096  # bytes of stderr
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


@dataclass(frozen=True)
class SuperviseFlags:
    """Run the command after `--`, and start it again if it ends before it is done."""

    max_restarts: int = 10
    """Give up after so many restarts in a row of a run that ends within ten minutes or as the one before; 0 never restarts."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int
    """As a shell shows it: 128 + signal if a signal killed it."""
    killed: bool
    """Whether a signal killed it."""
    seconds: float
    last_line: str
    """The last line that it wrote to stderr."""

    def __str__(self) -> str:
        number = self.status - 128
        known = self.killed and number in {*signal.Signals}
        how = f"{signal.Signals(number).name} killed it" if known else f"status {self.status}"
        return f"{how} after {self.seconds:.0f} s" + (f": {redacted(self.last_line)[:300]}" if self.last_line else "")


def supervise_command(arguments: Sequence[str]) -> int:
    """Parse the flags before `--`, and run the command after it; returns the exit status.

    Raises:
        UserError: there is no command.
    """
    own, command = list(arguments), []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    flags = parse(SuperviseFlags, own, program="python -m pretrain_xla supervise", command="supervise")
    if not command:
        raise UserError(
            "supervise: name the command after `--`, as in: supervise -- python run_pretrain_xla.py --config …"
        )
    if flags.max_restarts < 0:
        raise UserError(f"--max-restarts {flags.max_restarts}: name 0 or more")
    with _Child() as child:
        return supervise(command, flags.max_restarts, child)


def supervise(command: Sequence[str], max_restarts: int, child: _Child) -> int:
    """Run a command until it is done, was asked to stop, or is not worth another start; returns its last status."""
    in_a_row, line_before = 0, ""
    while True:
        ended = child.run(command)
        is_equal = ended.last_line != "" and ended.last_line == line_before
        line_before = ended.last_line
        in_a_row = 0 if ended.seconds >= HEALTHY_SECONDS and not is_equal else in_a_row
        if (final := _final(ended, is_equal, child)) is not None:
            if ended.status:
                _say(f"{ended}; {final}")
            return ended.status
        if in_a_row == max_restarts:
            _say(f"gave up after {in_a_row} restarts without progress; the last: {ended}")
            return ended.status
        pause = min(FIRST_PAUSE * 2**in_a_row, LONGEST_PAUSE)
        in_a_row += 1
        _say(f"{ended}; starts again in {pause:.0f} s (restart {in_a_row} of {max_restarts} in a row)")
        if (number := child.sleep(pause)) is not None:
            return 128 + number


def _final(ended: Ended, is_equal: bool, child: _Child) -> str | None:
    """Why a run is not started again. None means that it is."""
    if ended.status == 0:
        return "done"
    if child.asked is not None or ended.status - 128 in _STOPS:
        return "it was asked to stop, and is not started again"
    if ended.status == _FIXABLE and (is_equal or ended.seconds < FIXABLE_SECONDS):
        return "fix that first: it is not started again"
    return None


class _Child:
    """The run, in a process group of its own, so that a Ctrl-C on the terminal reaches it once, through the supervisor."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The first signal that asked the supervisor to stop."""
        self._since = time.time()  # --stop-after counts from here over all starts
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _Child:
        self._previous = {number: signal.signal(number, self._pass_on) for number in _STOPS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str]) -> Ended:
        """Run the command to its end; what it leaves behind is ended, too.

        Raises:
            UserError: there is no such program.
        """
        begin = time.monotonic()
        try:
            process = subprocess.Popen(
                command,
                stderr=subprocess.PIPE,
                process_group=0,
                preexec_fn=_end_with_parent(os.getpid()),
                env={**os.environ, "PRETRAIN_XLA_SUPERVISED_SINCE": str(self._since)},
            )
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started: {error.strerror or error}") from None
        self._process = process
        if self.asked is not None:  # meanwhile
            process.send_signal(self.asked)
        last = bytearray()
        copier = threading.Thread(target=_copy, args=(process, last), daemon=True)
        copier.start()
        code = process.wait()
        self._process = None
        _end_group(process.pid)
        copier.join(1.0)  # a process that left the group may hold the pipe open
        lines = [line for line in re.split(r"[\r\n]+", last.decode("utf-8", "replace")) if line.strip()]
        seconds = time.monotonic() - begin
        return Ended(code if code >= 0 else 128 - code, code < 0, seconds, lines[-1].strip() if lines else "")

    def sleep(self, seconds: float) -> int | None:
        """Wait; returns the signal that asked to stop meanwhile. None means none."""
        limit = time.monotonic() + seconds
        while self.asked is None and (left := limit - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return self.asked

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _end_with_parent(parent: int) -> Callable[[], None]:
    """For the child: ask it to stop if the supervisor is killed; otherwise it would go on beside the next one."""
    library = ctypes.CDLL(None)

    def prepare() -> None:
        if hasattr(library, "prctl"):
            library.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _copy(process: subprocess.Popen[bytes], last: bytearray) -> None:
    """Pass on what the run writes to stderr, and keep the end of it."""
    assert process.stderr is not None
    while part := os.read(process.stderr.fileno(), 2**16):
        os.write(2, part)
        last += part
        del last[:-_KEPT]


def _end_group(group: int) -> None:
    """End the processes that a run left behind: first asked, then killed."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
            limit = time.monotonic() + seconds
            while time.monotonic() < limit:
                os.killpg(group, 0)
                time.sleep(0.05)


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)
