"""A file that only grows, on a disk that may be full for a while.

A run goes on when its records cannot be written: hours of computing are worth more than the lines that tell of them, and
stopping would lose what was trained since the last checkpoint. What the disk does not take stays in memory, in order, and is
written with the next lines that it does take.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pretrain_xla.system_faults import reason


class Appender:
    """Appends bytes, each time as far as the disk takes them.

    Args:
        path: of the file, made where it is missing.
        warn: takes a line when the disk begins to refuse, one when it takes them again, and one at the end if it never did.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._waiting = bytearray()
        self._refused = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, data: bytes) -> None:
        """Append; on the disk when this returns, or else kept."""
        self._waiting += data
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            if not self._refused:
                self._warn(
                    f"{self._path} cannot be written ({reason(error)}): the run goes on and keeps the lines in memory until "
                    "there is room"
                )
            self._refused = True
            return
        if self._refused:
            self._warn(f"{self._path} is written again, nothing of it is lost")
            self._refused = False

    def close(self) -> None:
        """Try once more, and let go."""
        if self._waiting:
            self.write(b"")
        if self._waiting:
            lines = self._waiting.count(b"\n")
            self._warn(f"{self._path}: the last {lines:,} lines could not be written and are lost")
        os.close(self._descriptor)
