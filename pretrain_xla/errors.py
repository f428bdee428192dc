"""The one exception that a person is meant to read.

Every fault that a user can mend (a wrong key, a missing folder, a mesh that does not fit) is raised as `UserError`. The
command line prints its text as one line and exits with status 2; anything else is a defect of ours and keeps its trace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """A fault in what was asked for: the text says what is wrong, where, and how to mend it, in one line."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved its state; the command line exits with 128 + `signal`."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn `UserError` into one line on stderr and exit status 2, and a stop by signal into 128 + signal."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> None:
        try:
            function(*arguments, **keywords)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except Interrupted as error:
            print(str(error), file=sys.stderr, flush=True)
            raise SystemExit(128 + error.signal) from None

    return run
