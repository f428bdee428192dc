"""Loads shards ahead of use: each is made local, checked and opened before the batches need it, and released afterwards.

The batches say which shards they read now and which are next (`plan`). Local shards without checksum cost nothing: they are
opened. For the others one thread works ahead. It fetches a remote shard into the cache, in several parts at a time. It
compares checksums if a manifest has them (of local shards once per process, at about half a second for each GB). It decodes
Parquet. No token of a shard is used before that is done; a batch waits for a shard that is not ready.

Whole shards or ranges? Sequences of a window of shards are shuffled together, so a single process soon needs all of each
shard. One of many hosts needs little of each, and a validation a small part of one. So, with remote_reads=auto, a process
that will request less than `WHOLE_SHARE` of the bytes requests only the ranges that it needs, in whole blocks where the
manifest has checksums of blocks. So does every process if the cache cannot hold the shards of two windows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain_xla.config import DataConfig
from pretrain_xla.data import parquet
from pretrain_xla.data.block_checksums import BLOCK_BYTES
from pretrain_xla.data.shards import Shard, open_tokens, read_bytes
from pretrain_xla.data.token_file import TokenFile, differs, is_verified
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted
from pretrain_xla.storage.cache import CacheFullError, Entry, ShardCache
from pretrain_xla.storage.remote import concurrently

logger = logging.getLogger(__name__)

WHOLE_SHARE = 0.25
PART_BYTES, PARTS_AT_A_TIME = 2**23, 8  # of a download: bounds the memory that it needs
_LONGEST_NAME = 100  # characters of a shard's name in that of its cached copy


@dataclass
class _State:
    """State shared by the thread and its loader, protected by the condition's lock."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    wanted: list[int] = field(default_factory=list)
    """Shards in the order in which they are needed."""
    now: set[int] = field(default_factory=set)
    """Those that are read now, so the cache must hold them."""
    ready: dict[int, TokenFile | None] = field(default_factory=dict)
    """None if a shard is read by ranges. A file of the cache is kept there while it is open."""
    errors: dict[int, BaseException] = field(default_factory=dict)
    postponed: set[int] = field(default_factory=set)
    """Not needed yet, and the cache has no room yet."""
    awaited: Counter[int] = field(default_factory=Counter)
    """Shard → number of waiting threads. It and its error are kept, whatever another thread plans meanwhile."""
    closing: threading.Event = field(default_factory=threading.Event)


class ShardLoader:
    """The tokens of a dataset's shards, by number.

    Args:
        shards: from `open_shard`.
        checksums: name → SHA-256, for shards that have one.
        settings: cache_dir, cache_gb, remote_reads.
    """

    def __init__(self, shards: Sequence[Shard], checksums: Mapping[str, str], settings: DataConfig) -> None:
        self._shards, self._settings = shards, settings
        self._cache = ShardCache(settings.cache_dir or default_cache(), int(settings.cache_gb * 1e9))
        self._maker = _Maker(shards, checksums, self._cache)
        self._state = _State()
        self._thread: threading.Thread | None = None
        self.ranged = settings.remote_reads == "ranged"
        """Whether remote shards are read by ranges."""
        weakref.finalize(self, _close, self._state)

    def choose(self, share: float, window: int, length: int) -> None:
        """Decide between whole shards and ranges.

        Args:
            share: fraction of all sequences that this process will read in the run.
            window: shards that are in use at a time.
            length: tokens of a sequence.

        Raises:
            UserError: remote_reads is impossible with these shards or this cache.
        """
        mode = self._settings.remote_reads
        cached = [shard for shard in self._shards if shard.is_remote or shard.format == "parquet"]
        packed = next((shard for shard in cached if shard.format == "parquet"), None)
        needed = sum(sorted(map(_cached_bytes, cached))[-2 * window :])
        if not cached:
            self.ranged = False
            return
        if packed and mode == "ranged":
            raise UserError(f"{packed.path}: Parquet cannot be read by ranges: leave out remote_reads=ranged")
        if needed > self._cache.capacity and (packed or mode == "whole"):
            raise UserError(
                f"{self._cache.directory}: cache_gb={self._settings.cache_gb:g} is too small for two windows of shards, "
                f"{needed / 1e9:.3g} GB: raise cache_gb or lower shuffle_window={window}"
            )
        bytes_asked = max(_bytes_asked(shard, length) for shard in cached)
        small = share * bytes_asked < WHOLE_SHARE or needed > self._cache.capacity
        self.ranged = mode == "ranged" or (mode == "auto" and small and packed is None)
        unchecked = next((shard for shard in cached if shard.crc32 is None), None)
        if self.ranged and unchecked:
            logger.warning(
                "%s: read by ranges, which are not compared with checksums: `inspect --write-checksums` records them",
                redacted(unchecked.path),
            )

    def plan(self, now: Iterable[int], soon: Iterable[int]) -> None:
        """Say which shards are read from now on; load the next ones meanwhile, and release all others."""
        now, state = list(now), self._state
        with state.changed:
            state.now = {*now, *state.awaited}
            state.wanted = list(dict.fromkeys([*state.awaited, *now, *soon]))
            state.postponed.clear()
            for number in [number for number in state.errors if number not in state.awaited]:
                del state.errors[number]  # a shard that failed ahead of use is tried again
            for number in [number for number in state.ready if number not in state.wanted]:
                del state.ready[number]
            state.changed.notify_all()
        if any(self._needs_work(number) for number in state.wanted):
            self._start()

    def tokens(self, number: int) -> TokenFile | None:
        """A shard's tokens, once they are open. None means that they are read by ranges.

        Raises:
            UserError: it cannot be read, or differs from its checksum.
        """
        state = self._state
        with state.changed:
            if number not in state.ready and not self._needs_work(number):
                shard = self._shards[number]
                checksum = self._maker.checksum(shard)  # already compared, or there is none
                state.ready[number] = None if shard.is_remote else open_tokens(shard, checksum)
            elif number not in state.ready:
                state.now.add(number)
                state.postponed.discard(number)
                state.wanted = [number, *(other for other in state.wanted if other != number)]
                state.changed.notify_all()
                self._start()
            state.awaited[number] += 1
            while number not in state.ready and number not in state.errors:
                state.changed.wait()
            state.awaited -= Counter([number])  # removes entries that reach zero
            if number in state.errors:
                raise state.errors[number]
            return state.ready[number]

    def _needs_work(self, number: int) -> bool:
        shard = self._shards[number]
        return not (shard.is_remote and self.ranged) and self._maker.has_work(number)

    def _start(self) -> None:
        if self._thread is None:
            # The thread must not refer to `self`, or it could never be garbage-collected.
            arguments = (self._state, self._maker)
            self._thread = threading.Thread(target=_work, args=arguments, name="shard loader", daemon=True)
            self._thread.start()


class _Maker:
    """Makes a shard ready: fetched, checked, decoded, opened."""

    def __init__(self, shards: Sequence[Shard], checksums: Mapping[str, str], cache: ShardCache) -> None:
        self._shards, self._checksums, self._cache = shards, checksums, cache

    def checksum(self, shard: Shard) -> str | None:
        """SHA-256 by the manifest."""
        return self._checksums.get(shard.name)

    def has_work(self, number: int) -> bool:
        """Whether a shard needs more than being opened."""
        shard = self._shards[number]
        checksum = self.checksum(shard)
        unverified = checksum is not None and not is_verified(shard.path, shard.stamp, checksum)
        return shard.is_remote or shard.format == "parquet" or unverified

    def make(self, number: int, closing: threading.Event) -> TokenFile:
        """Raises `CacheFullError` and `UserError`."""
        shard = self._shards[number]
        checksum = self.checksum(shard)
        if not shard.is_remote and shard.format != "parquet":
            return open_tokens(shard, checksum)
        tree = [shard.path, shard.size, shard.stamp, checksum]
        key = f"{hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:20]}-{shard.name[-_LONGEST_NAME:]}"
        if shard.format == "parquet":
            size = shard.tokens * shard.dtype.itemsize
            decode = functools.partial(self._decode, shard, key, checksum, closing)
            return _open_entry(shard, self._cache.obtain(f"{key}.ids", size, decode), 0)
        return _open_entry(shard, self._fetch(shard, key, checksum, closing), shard.offset)

    def without_cache(self, number: int) -> None:
        """While other shards in use fill the cache: read this one by ranges.

        Raises:
            UserError: it is Parquet, which cannot be read by ranges.
        """
        shard = self._shards[number]
        if shard.format == "parquet":
            raise UserError(f"{self._cache.directory}: full of shards in use, no room for {shard.path}: raise cache_gb")

    def _fetch(self, shard: Shard, key: str, checksum: str | None, closing: threading.Event) -> Entry:
        def check(sha256: str) -> None:
            if expected not in (None, sha256):
                raise differs(shard.path)

        expected = checksum or (shard.stated[1] if shard.stated and shard.stated[0] == "sha256" else None)
        return self._cache.obtain(key, shard.size, functools.partial(_download, shard, closing), check)

    def _decode(self, shard: Shard, key: str, checksum: str | None, closing: threading.Event, path: str) -> None:
        raw = self._fetch(shard, key, checksum, closing) if shard.is_remote else None
        local = None if raw else open_tokens(shard, checksum)
        with open(path, "r+b") as file:
            for ids in parquet.blocks(shard.path, raw.path if raw else shard.path, shard.dtype):
                file.write(ids.data)
            written = file.tell()
        if raw:
            raw.close()
        if local:
            local.verify()
        if written != shard.tokens * shard.dtype.itemsize:
            raise UserError(f"{shard.path}: {parquet.COLUMN} has empty or missing rows: tokenise it again")


def default_cache() -> str:
    """Where fetched shards are kept by default."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pretrain_xla", "shards")


def _cached_bytes(shard: Shard) -> int:
    decoded = shard.tokens * shard.dtype.itemsize if shard.format == "parquet" else 0
    return decoded + (shard.size if shard.is_remote else 0)


def _bytes_asked(shard: Shard, length: int) -> float:
    """Bytes that are requested for each byte of a sequence: more than one if whole blocks are compared with checksums."""
    return 1.0 if shard.crc32 is None else 1 + BLOCK_BYTES / (length * shard.dtype.itemsize)


def _open_entry(shard: Shard, entry: Entry, offset: int) -> TokenFile:
    return TokenFile(entry.path, shard.path, shard.dtype, offset, descriptor=entry.descriptor)


def _download(shard: Shard, closing: threading.Event, path: str) -> None:
    """Download a remote shard into an existing file, several parts at a time."""
    descriptor = os.open(path, os.O_WRONLY)

    def fetch(begin: int) -> None:
        if closing.is_set():
            raise InterruptedError("closing")
        os.pwrite(descriptor, read_bytes(shard, begin, min(begin + PART_BYTES, shard.size)), begin)

    try:
        concurrently(fetch, range(0, shard.size, PART_BYTES), PARTS_AT_A_TIME)
    finally:
        os.close(descriptor)
    if shard.crc32 is None and shard.stated and shard.stated[0] == "md5":
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != shard.stated[1]:
                raise UserError(
                    f"{shard.path}: what came differs from the checksum that its server states: start again; if that does "
                    "not help, copy the shard there again"
                )


def _work(state: _State, maker: _Maker) -> None:
    """The thread: makes the wanted shards ready, in order, until the loader is closed or garbage-collected."""
    while True:
        with state.changed:
            while (number := _next(state)) is None and not state.closing.is_set():
                state.changed.wait()
            if number is None or state.closing.is_set():
                return
        made, error = _try(maker, number, state)
        with state.changed:
            if isinstance(error, CacheFullError):
                if number not in state.now:  # if it is needed by now, the next iteration does without the cache
                    state.postponed.add(number)
            elif error is not None:
                state.errors[number] = error
            elif number in state.wanted:
                state.ready[number] = made
            made = None  # or it would stay open, and in the cache
            state.changed.notify_all()


def _next(state: _State) -> int | None:
    done = (state.ready, state.errors, state.postponed)
    return next((number for number in state.wanted if not any(number in part for part in done)), None)


def _try(maker: _Maker, number: int, state: _State) -> tuple[TokenFile | None, BaseException | None]:
    try:
        try:
            return maker.make(number, state.closing), None
        except CacheFullError as full:
            if number not in state.now:
                return None, full
            maker.without_cache(number)
            return None, None
    except BaseException as error:  # any error is passed to the thread that waits for the shard
        return None, error


def _close(state: _State) -> None:
    state.closing.set()
    with state.changed:
        state.ready.clear()
        state.changed.notify_all()
