"""An append-only file that survives a full disk.

A run continues when its metrics cannot be written: stopping would lose the training since the last checkpoint. Lines that
could not be written stay in memory, in order, and are written as soon as there is room.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pretrain_xla.system_faults import reason


class Appender:
    """Appends bytes to a file; keeps in memory what could not be written yet.

    Args:
        path: the file, created if missing.
        warn: called with a line when writing starts to fail, when it works again, and on `close` if lines are lost.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._waiting = bytearray()
        self._refused = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, data: bytes) -> None:
        """Append `data`, or keep it in memory if the disk is full."""
        self._waiting += data
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            if not self._refused:
                self._warn(
                    f"{self._path} cannot be written ({reason(error)}): the run continues and keeps the lines in memory until "
                    "there is room"
                )
            self._refused = True
            return
        if self._refused:
            self._warn(f"{self._path} is written again, and no line is lost")
            self._refused = False

    def close(self) -> None:
        """Try to write what is left, and close the file."""
        if self._waiting:
            self.write(b"")
        if self._waiting:
            lines = self._waiting.count(b"\n")
            self._warn(f"{self._path}: the last {lines:,} lines could not be written and are lost")
        os.close(self._descriptor)
