"""A cache of files on a local disk: bounded in size, and shared by all processes of the host.

An entry is downloaded or decoded into a temporary file that its writer has locked, and renamed when it is complete. A process
that wants the same entry waits for that lock instead of downloading it again. If the writer is killed, the system frees the
lock, and the next process starts over. A process that uses an entry holds a shared lock on it. Only unlocked entries are
evicted, the least recently used first. The locks are `flock`, so the folder must be on a local disk.

fsspec's caches do not replace it: none bounds its size or shares a download between processes, and of four processes that
read one shard at once some got it wrong through `filecache` and `simplecache` (docs/LOG.md, "A cache that processes share").
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import PARTIAL

_SPACE_LOCK = ".lock"  # locked while sizes are added up and entries are evicted


class CacheFullError(Exception):
    """Everything in the cache is in use, and the new entry does not fit."""


class Entry:
    """A complete file of the cache. It is not evicted before it is closed or collected, or its process ends."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def map(self) -> mmap.mmap:
        """The content, memory-mapped. It stays readable if the file is deleted. An empty file cannot be mapped."""
        assert self._descriptor is not None
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """Allow eviction. Existing maps of the content stay readable, and keep the entry until they are collected."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

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

    def obtain(self, key: str, size: int, fill: Callable[[str], None]) -> Entry:
        """The entry of a key, created if it is missing.

        Args:
            key: a file name. It must change when the content changes.
            size: size of the content in bytes.
            fill: writes the content to the path that it is given, an existing file of `size` bytes.

        Raises:
            CacheFullError: the entries in use leave no room.
            UserError: the folder cannot be written.
            Exception: whatever `fill` raises.
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
                os.fsync(descriptor)
                os.rename(path + PARTIAL, path)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                return Entry(path, os.dup(descriptor))
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot keep shards here: {error.strerror or error}: free some space, or choose "
                "another --cache-dir or a smaller --cache-gb"
            ) from None

    def _existing(self, path: str, size: int) -> Entry | None:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, path) and os.fstat(descriptor).st_size == size:
                os.utime(descriptor)  # eviction goes by the time of last use
                return Entry(path, descriptor)
            os.close(descriptor)
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
