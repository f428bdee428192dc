"""A cache of files on a local disk: bounded in size, and shared by all processes of the host.

An entry is downloaded or decoded into a temporary file that its writer has locked, and renamed when it is complete. A process
that wants the same entry waits for that lock instead of downloading it again. If the writer is killed, the system frees the
lock, and the next process starts over. A process that uses an entry holds a shared lock on it. Only unlocked entries are
evicted, the least recently used first. The locks are `flock`, so the folder must be on a local disk.

An entry's name ends with a checksum of its content, which each process compares once before it uses the entry, at about half a
second for each GB. A damaged entry is removed and made again.

fsspec's caches do not replace it: none bounds its size or shares a download between processes, and of four processes that
read one shard at once some got it wrong through `filecache` and `simplecache` (docs/LOG.md, "A cache that processes share").
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import PARTIAL

logger = logging.getLogger(__name__)

_SPACE_LOCK = ".lock"  # locked while sizes are added up and entries are evicted
_DIGEST_DIGITS = 32  # of the SHA-256 in an entry's name
_verified: set[tuple[str, int]] = set()  # (path, inode) of the entries whose checksum this process has compared


class CacheFullError(Exception):
    """Everything in the cache is in use, and the new entry does not fit."""


class Entry:
    """A complete file of the cache. It is not evicted before it is closed or collected, or its process ends.

    It is read through `descriptor`. A duplicate of that keeps the entry, too, until it is closed.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def close(self) -> None:
        """Allow eviction."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


class ShardCache:
    """A folder of entries, by key.

    Args:
        directory: local folder, created if it is missing.
        capacity: total size of all entries, in bytes.
    """

    def __init__(self, directory: str, capacity: int) -> None:
        self.directory, self.capacity = os.path.abspath(os.path.expanduser(directory)), capacity

    def obtain(
        self, key: str, size: int, fill: Callable[[str], None], check: Callable[[str], None] = lambda sha256: None
    ) -> Entry:
        """The entry of a key, created if it is missing.

        Args:
            key: a file name. It must change when the content changes.
            size: size of the content in bytes.
            fill: writes the content to the path that it is given, an existing file of `size` bytes.
            check: raises an error if that content's SHA-256, in hex, is not as expected.

        Raises:
            CacheFullError: the entries in use leave no room.
            UserError: the folder cannot be written.
            Exception: whatever `fill` or `check` raises.
        """
        path = f"{self.directory}/{key}"
        try:
            os.makedirs(self.directory, exist_ok=True)
            if entry := self._existing(path, size):
                return entry
            with self._partial(path) as descriptor:
                # Another process may have written it while this one waited for the lock.
                if entry := self._existing(path, size):
                    return entry
                with self._space_lock():
                    self._make_room(size)
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                fill(path + PARTIAL)
                sha256 = _sha256(descriptor)
                check(sha256)
                os.fsync(descriptor)
                complete = f"{path}.{sha256[:_DIGEST_DIGITS]}"
                os.rename(path + PARTIAL, complete)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                _verified.add((complete, os.fstat(descriptor).st_ino))
                return Entry(complete, os.dup(descriptor))
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot keep shards here: {error.strerror or error}: free some space, or choose "
                "another --cache-dir or a smaller --cache-gb"
            ) from None

    def _existing(self, path: str, size: int) -> Entry | None:
        for complete in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * _DIGEST_DIGITS}"):
            with contextlib.suppress(FileNotFoundError):
                entry = Entry(complete, os.open(complete, os.O_RDWR))
                fcntl.flock(entry.descriptor, fcntl.LOCK_SH)
                if not _is_at(entry.descriptor, complete):
                    continue  # evicted meanwhile
                if _is_undamaged(entry, size):
                    os.utime(entry.descriptor)  # eviction goes by the time of last use
                    return entry
                logger.warning("%s: a damaged copy in the cache, which is made again", complete)
                os.unlink(complete)
        return None

    @contextlib.contextmanager
    def _partial(self, path: str) -> Iterator[int]:
        """A locked, empty file under the temporary name. It is removed on exit unless it was renamed."""
        partial = path + PARTIAL
        while True:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, partial):
                break
            os.close(descriptor)  # its former owner has renamed or removed it
        try:
            os.ftruncate(descriptor, 0)
            yield descriptor
        finally:
            if _is_at(descriptor, partial):
                os.unlink(partial)
            os.close(descriptor)

    @contextlib.contextmanager
    def _space_lock(self) -> Iterator[None]:
        with open(f"{self.directory}/{_SPACE_LOCK}", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Evict until `size` more bytes fit. Unfinished files of other processes count as used space."""
        files = self._files()
        room = self.capacity - sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if room >= size:
                return
            if _remove_unused(path):
                room += status.st_size
        if room < size:
            raise CacheFullError

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """All files that take space. Other processes may rename or remove one during the listing: then list again."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return [(path.stat(), path) for path in Path(self.directory).iterdir() if path.name != _SPACE_LOCK]


def _is_undamaged(entry: Entry, size: int) -> bool:
    status = os.fstat(entry.descriptor)
    if status.st_size != size:
        return False
    if (entry.path, status.st_ino) not in _verified:
        if not entry.path.endswith(f".{_sha256(entry.descriptor)[:_DIGEST_DIGITS]}"):
            return False
        _verified.add((entry.path, status.st_ino))
    return True


def _sha256(descriptor: int) -> str:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_at(descriptor: int, path: str) -> bool:
    """Whether a path still refers to this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds a lock on it. Returns whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
