"""A folder of files that were fetched or decoded, of bounded size, shared by all processes of the host.

An entry is written under a temporary name, in a file that its writer has locked, and renamed when it is complete. A process
that wants the same entry waits on that lock instead of fetching it again; when the writer is killed the system frees the
lock, and the next one begins anew. A user of an entry holds a shared lock on it. Only entries that nobody holds are evicted,
the least recently used first. Locks are `flock`: the folder belongs on a local disk.

fsspec's `filecache`, `simplecache` and `blockcache` do not serve here: they have no bound on their size and no lock between
processes, so that each process of a host fetches every shard for itself (docs/LOG.md has the count).
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

_GATE = ".lock"  # held while sizes are added up and room is made


class CacheFullError(Exception):
    """Everything in the cache is in use, and the new entry does not fit."""


class Entry:
    """A complete file of the cache, which stays there until it is closed, or forgotten, or its process ends."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def map(self) -> mmap.mmap:
        """Its content, in memory; not for an empty one. Works even where the file has been removed by force."""
        assert self._descriptor is not None
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """Let the cache evict it. What has been mapped of it stays readable."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


class ShardCache:
    """Entries by key, in one folder.

    Args:
        directory: local folder; made where it is missing.
        capacity: bytes that all entries together may have.
    """

    def __init__(self, directory: str, capacity: int) -> None:
        self.directory, self.capacity = os.path.abspath(os.path.expanduser(directory)), capacity

    def obtain(self, key: str, size: int, fill: Callable[[str], None]) -> Entry:
        """The entry of that key, made first where it is not there.

        Args:
            key: a file name; it must change when the content does.
            size: bytes that it has, or will have.
            fill: writes the content to a path, whose file is there and has `size` bytes already.

        Raises:
            CacheFullError: no room, now.
            UserError: the folder cannot be written; and what `fill` raises.
        """
        path = f"{self.directory}/{key}"
        try:
            os.makedirs(self.directory, exist_ok=True)
            if entry := self._existing(path, size):
                return entry
            with self._partial(path) as descriptor:
                # Another process may have made it while this one waited for the lock.
                if entry := self._existing(path, size):
                    return entry
                with self._gate():
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
                os.utime(descriptor)  # of least recent use
                return Entry(path, descriptor)
            os.close(descriptor)
        return None

    @contextlib.contextmanager
    def _partial(self, path: str) -> Iterator[int]:
        """A locked, empty file under the temporary name; removed on leaving, unless it was renamed."""
        partial = path + PARTIAL
        while True:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, partial):
                break
            os.close(descriptor)  # the one who held it has renamed or removed it meanwhile
        try:
            os.ftruncate(descriptor, 0)
            yield descriptor
        finally:
            if _is_at(descriptor, partial):
                os.unlink(partial)
            os.close(descriptor)

    @contextlib.contextmanager
    def _gate(self) -> Iterator[None]:
        with open(f"{self.directory}/{_GATE}", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Evict, until `size` bytes more fit. Space that unfinished files of other processes have taken counts too."""
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
        """What takes space. Makers rename and remove their files at any time: then it is looked at again."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return [(path.stat(), path) for path in Path(self.directory).iterdir() if path.name != _GATE]


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody holds a lock on it."""
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
