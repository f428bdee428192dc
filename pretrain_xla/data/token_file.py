"""A local file of token ids, read by position and not mapped into memory.

The file may shrink, vanish, or be replaced while a run reads it. A mapped page that is no longer in the file kills the process
with SIGBUS, and one that was overwritten gives other ids without a word. A read ends short instead, and a look at the file's
size and modification time after it tells the rest. That costs about 1 µs for each range of tokens, as much again as a copy
from a map does at 2 KB (docs/LOG.md, "Reading shards, and checking them").
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Any, NoReturn

import numpy as np

from pretrain_xla.errors import UserError

Stamp = tuple[int | str, ...]
"""Inode and modification time of a local file."""

_BLOCK = 2**22  # bytes read at a time for a checksum
_AGAIN = "then the same command continues from the last checkpoint"
_verified: set[tuple[str, Stamp, str]] = set()  # files whose checksum this process has compared


class TokenFile:
    """An open file of token ids. It is closed when it is collected, and stays readable if the file is deleted meanwhile.

    Args:
        path: the file.
        where: path or URL of its origin, for messages.
        dtype: type of the ids.
        offset: bytes before the first id.
        size: bytes of the file, or None for a file that cannot be told from a changed one (a cache entry, which others touch).
        stamp: of the file whose header was read; another one is accepted only if the checksum is right.
        checksum: SHA-256 of the file, if it is known and to be compared.
        descriptor: of the open file, which is duplicated; None opens the path.

    Raises:
        UserError: it is gone, has changed, or differs from its checksum.
    """

    def __init__(
        self,
        path: str,
        where: str,
        dtype: np.dtype[Any],
        offset: int,
        *,
        size: int | None = None,
        stamp: Stamp = (),
        checksum: str | None = None,
        descriptor: int | None = None,
    ) -> None:
        self._descriptor = -1
        self._where, self._dtype, self._offset = where, dtype, offset
        self._size, self._stamp, self._checksum = size, stamp, checksum
        try:
            self._descriptor = os.open(path, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
        except FileNotFoundError:
            raise gone(where) from None
        except OSError as error:
            self._fail(error)
        if size is not None:
            self.verify()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Ranges of tokens as they are stored: [ranges, length].

        Args:
            starts: [ranges], position in the file of each range's first token.
            length: tokens of a range.

        Raises:
            UserError: the file cannot be read, or has changed since the run started.
        """
        out = np.empty((len(starts), length), self._dtype)
        while True:
            before = self._stamp
            self._fill(starts, out)
            if self._size is None or self._stat() == (self._size, before):
                return out
            self.verify()  # touched, or copied over with the same content: what was read meanwhile is read again

    def _fill(self, starts: np.ndarray, out: np.ndarray) -> None:
        count = out.shape[1] * self._dtype.itemsize
        view = out.reshape(-1).view(np.uint8).data
        for row, start in enumerate(starts.tolist()):
            done, begin = row * count, self._offset + start * self._dtype.itemsize
            while done < (row + 1) * count:
                read = self._read_into(view[done : (row + 1) * count], begin + done - row * count)
                if not read:
                    raise UserError(f"{self._where}: was truncated while the run reads it: put it back, {_AGAIN}")
                done += read

    def _read_into(self, buffer: memoryview, begin: int) -> int:
        try:
            return os.preadv(self._descriptor, [buffer], begin)
        except OSError as error:
            self._fail(error)

    def _stat(self) -> tuple[int, Stamp]:
        status = os.fstat(self._descriptor)
        return status.st_size, (status.st_ino, status.st_mtime_ns)

    def verify(self) -> None:
        """Accept the file as it is now: unchanged since its header was read, or with the right checksum.

        Raises:
            UserError: it has changed, or differs from its checksum.
        """
        size, stamp = self._stat()
        while self._checksum is not None and size == self._size:
            if (self._where, stamp, self._checksum) not in _verified:
                if self._sha256() != self._checksum:
                    raise differs(self._where)
                if self._stat() != (size, stamp):  # written to meanwhile
                    size, stamp = self._stat()
                    continue
                _verified.add((self._where, stamp, self._checksum))
            self._stamp = stamp
            return
        if (size, stamp) != (self._size, self._stamp):
            raise UserError(f"{self._where}: was changed while the run reads it: put it back, {_AGAIN}")

    def _sha256(self) -> str:
        checksum, done = hashlib.sha256(), 0
        block = memoryview(bytearray(_BLOCK))
        while read := self._read_into(block, done):
            checksum.update(block[:read])
            done += read
        return checksum.hexdigest()

    def _fail(self, error: OSError) -> NoReturn:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise error  # no fault of the file: `system_faults` explains it
        raise UserError(f"{self._where}: cannot be read: {error.strerror or error}: fix that, {_AGAIN}") from None


def gone(where: str) -> UserError:
    """The error of a shard that was there when the run started."""
    return UserError(f"{where}: existed when the run started and is gone: put it back, {_AGAIN}")


def differs(where: str) -> UserError:
    """The error of a shard that has changed since its checksum was recorded."""
    return UserError(f"{where}: differs from its checksum: copy it again or prepare again, {_AGAIN}")


def is_verified(where: str, stamp: Stamp, checksum: str) -> bool:
    """Whether this process has compared the checksum of this file."""
    return (where, stamp, checksum) in _verified
