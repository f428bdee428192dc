"""One shard: a file of token ids in any of the formats of `formats`; and a writer of shards.

A local file other than Parquet is read in place: opening it costs nothing, and what was read is in the page cache, which all
processes of the host share. Other shards are made local by `shard_loader`, or read by ranges.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pretrain_xla.data import parquet
from pretrain_xla.data.block_checksums import block_checksums, read_checked, widened
from pretrain_xla.data.formats import DTYPES, HEAD_BYTES, Format, header, is_parquet, layout, suffix
from pretrain_xla.data.manifest import ShardInfo, SplitInfo
from pretrain_xla.data.token_file import TokenFile, differs, gone
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import VERSION_KEYS, filesystem, is_local, url, write_atomically
from pretrain_xla.storage.remote import call, concurrently, read_range
from pretrain_xla.storage.retries import RefusedError

WrittenFormat = Literal["npy", "bin", "parquet"]
_OVERFULL = 1.1  # the last shard may be larger by this factor, so that no tiny one follows


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary."""
    return DTYPES[0] if vocab_size <= 2**16 else DTYPES[1]


def write_shard(fs: Any, path: str, tokens: np.ndarray, format: WrittenFormat = "npy") -> ShardInfo:
    """Write a shard atomically.

    Args:
        fs: an fsspec file system.
        path: path on that file system.
        tokens: [tokens], uint16 or uint32.
        format: the format to write.

    Raises:
        UserError: it cannot be written.
    """
    if format == "parquet":
        parts: list[Any] = [parquet.encode(tokens)]
    else:
        parts = [header(format, tokens), np.ascontiguousarray(tokens).data.cast("B")]
    checksum, name = write_atomically(fs, path, parts), path.rpartition("/")[2]
    highest = int(tokens.max(initial=0))
    return ShardInfo(name=name, tokens=len(tokens), max_id=highest, sha256=checksum, crc32=block_checksums(parts))


class ShardWriter:
    """Collects tokens, and writes a shard to its folder whenever there are enough.

    Every shard has `shard_size` tokens, except for the last, which has from a tenth of that to a tenth more.
    """

    def __init__(
        self, fs: Any, folder: str, dtype: np.dtype[Any], shard_size: int, format: WrittenFormat = "npy"
    ) -> None:
        self._fs, self._folder, self._shard_size, self._format = fs, folder, shard_size, format
        self._pending = [np.empty(0, dtype)]
        self._waiting = self._documents = 0
        self._shards: list[ShardInfo] = []

    def append(self, tokens: np.ndarray, documents: int) -> None:
        """Add the tokens of `documents` more documents; their type must be the writer's."""
        self._pending.append(tokens)
        self._waiting += len(tokens)
        self._documents += documents
        if self._waiting > self._shard_size * _OVERFULL:
            joined = np.concatenate(self._pending)
            while len(joined) > self._shard_size * _OVERFULL:
                self._write(joined[: self._shard_size])
                joined = joined[self._shard_size :]
            self._pending, self._waiting = [joined.copy()], len(joined)

    @property
    def written(self) -> SplitInfo:
        """The shards so far, and the number of documents so far."""
        tokens = sum(shard.tokens for shard in self._shards)
        return SplitInfo(documents=self._documents, tokens=tokens, shards=tuple(self._shards))

    def waiting(self) -> np.ndarray:
        """The tokens that are not yet in a shard."""
        return np.concatenate(self._pending)

    def restore(self, written: SplitInfo, waiting: np.ndarray) -> None:
        """Continue where another writer stopped."""
        self._shards, self._documents = list(written.shards), written.documents
        self._pending, self._waiting = [waiting], len(waiting)

    def close(self) -> SplitInfo:
        """Write the remaining tokens; returns all that was written."""
        if self._waiting:
            self._write(np.concatenate(self._pending))
        return self.written

    def _write(self, tokens: np.ndarray) -> None:
        path = f"{self._folder}/{len(self._shards):06d}{suffix(self._format)}"
        self._shards.append(write_shard(self._fs, path, tokens, self._format))


@dataclass(frozen=True)
class Shard:
    """A shard whose header has been read and checked against the size of the file."""

    path: str
    """Local path or URL."""
    name: str
    tokens: int
    dtype: np.dtype[Any]
    """Type of the ids; for Parquet, of the decoded ids."""
    offset: int
    """Bytes before the first token; meaningless for Parquet."""
    stamp: tuple[int | str, ...] = ()
    """Inode and modification time, or the version by the bucket: tells a replaced file from the one before."""
    format: Format = "npy"
    size: int = 0
    """Size of the file in bytes."""
    max_id: int | None = None
    """Highest id, if the file states it."""
    crc32: bytes | None = None
    """Checksums of the blocks of a remote shard, if they are known: ranges of it are compared with them."""
    stated: tuple[str, str] | None = None
    """Checksum of a remote file by its server: the name of the algorithm, and hexadecimal digits."""

    @property
    def is_remote(self) -> bool:
        """Whether it is on a remote file system."""
        return "://" in self.path

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read ranges of tokens, as stored and without the cache: [len(starts), length]. Not for Parquet.

        Args:
            starts: [ranges], position in the shard of each range's first token.
            length: tokens of a range.
        """
        assert self.format != "parquet"
        if not self.is_remote:
            return open_tokens(self).rows(starts, length)
        out = np.empty((len(starts), length), self.dtype)
        fetch([self] * len(starts), starts, out)
        return out


def fetch(shards: list[Shard], starts: np.ndarray, out: np.ndarray) -> None:
    """Read ranges of remote shards into the rows of `out`, with one request for each or, if they are adjacent, for several.

    Where checksums of blocks are known, whole blocks are requested and compared.

    Args:
        shards: [rows] the shard of each range.
        starts: [rows] position of its first token in the shard.
        out: [rows, tokens of a range], any integer type.

    Raises:
        UserError: one cannot be read, or is damaged.
    """
    length = out.shape[1]
    # Stretches that follow one another become one request: [shard, first byte, byte after the last, rows].
    requests: list[tuple[Shard, int, int, list[int]]] = []
    for row in sorted(range(len(shards)), key=lambda row: (shards[row].path, int(starts[row]))):
        shard = shards[row]
        begin = shard.offset + int(starts[row]) * shard.dtype.itemsize
        end = begin + length * shard.dtype.itemsize
        if shard.crc32 is not None:
            begin, end = widened(begin, end, shard.size)
        if requests and requests[-1][0] is shard and begin <= requests[-1][2]:
            first = requests.pop()
            requests.append((shard, first[1], max(end, first[2]), [*first[3], row]))
        else:
            requests.append((shard, begin, end, [row]))

    def read(request: tuple[Shard, int, int, list[int]]) -> None:
        shard, begin, end, rows = request
        data = read_bytes(shard, begin, end)
        for row in rows:
            position = shard.offset + int(starts[row]) * shard.dtype.itemsize - begin
            out[row] = narrow(np.frombuffer(data, shard.dtype, length, position))

    concurrently(read, requests)


def read_bytes(shard: Shard, begin: int, end: int) -> bytes:
    """Bytes of a remote shard, compared with the checksums of its blocks if they are known; then `begin` begins a block.

    Raises:
        UserError: they cannot be read, or are damaged.
    """
    fs, path = filesystem(shard.path)
    try:
        if shard.crc32 is None:
            return read_range(fs, path, begin, end)
        data = read_checked(lambda first, last: read_range(fs, path, first, last), begin, end, shard.crc32)
    except FileNotFoundError:
        raise gone(shard.path) from None
    if data is None:
        raise differs(shard.path)
    return data


def open_tokens(shard: Shard, checksum: str | None = None) -> TokenFile:
    """Open a local shard other than Parquet.

    Args:
        shard: its header.
        checksum: SHA-256 of the file, which is compared, at about half a second for each GB; None compares nothing.

    Raises:
        UserError: it is gone, was changed since its header was read, or differs from its checksum.
    """
    return TokenFile(
        shard.path, shard.path, shard.dtype, shard.offset, size=shard.size, stamp=shard.stamp, checksum=checksum
    )


def open_shard(fs: Any, path: str, known: Mapping[str, Any] | None = None) -> Shard:
    """Recognise a shard's format, read its header, and check that against the size of the file.

    Args:
        fs: an fsspec file system.
        path: path on that file system.
        known: its entry in a listing of the folder, which saves a request.

    Raises:
        UserError: the format is unknown, it does not hold integers, or it is shorter or longer than its header says.
    """
    where, stated = url(fs, path), None
    try:
        if is_local(fs):
            status = os.stat(path)
            size = status.st_size
            stamp: tuple[int | str, ...] = (status.st_ino, status.st_mtime_ns)
            with open(path, "rb") as file:
                head = file.read(HEAD_BYTES)
        else:
            size, stamp, stated = _remote_size(fs, path, where, known)
            head = read_range(fs, path, 0, min(size, HEAD_BYTES)) if size else b""
        name = path.rpartition("/")[2]
        if is_parquet(head):
            footer = parquet.summarise(where, size, lambda begin, end: read_range(fs, path, begin, end))
            return Shard(
                where, name, footer.tokens, footer.dtype, 0, stamp, "parquet", size, footer.max_id, None, stated
            )
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise UserError(f"{where}: cannot be read: {reason}") from None
    found = layout(where, size, head, lambda other: read_sibling(fs, path.rpartition("/")[0], other))
    return Shard(where, name, found.tokens, found.dtype, found.offset, stamp, found.format, size, stated=stated)


def read_sibling(fs: Any, folder: str, name: str) -> bytes | None:
    """The content of a file in a folder of shards. None means that there is no such file."""
    try:
        data: bytes = call(fs, "cat_file", f"{folder}/{name}")
    except (OSError, RefusedError):  # some servers refuse access to files that they do not have
        return None
    return data


def narrow(tokens: np.ndarray) -> np.ndarray:
    """Clip ids to int32: those outside become -1 or the maximum, so that none is taken for another id."""
    if tokens.dtype.itemsize <= 4:
        return tokens
    return np.clip(tokens, None if tokens.dtype.kind == "u" else -1, 2**31 - 1)


def _remote_size(
    fs: Any, path: str, where: str, known: Mapping[str, Any] | None
) -> tuple[int, tuple[int | str, ...], tuple[str, str] | None]:
    """Size of a remote file in bytes, and its version and checksum by the server."""
    info = known if known and known.get("size") is not None else call(fs, "info", path)
    if info.get("size") is None:
        raise UserError(f"{where}: its server does not report its size: copy it to a disk or a bucket")
    stamp = tuple(json.dumps([key, info[key]], default=str) for key in VERSION_KEYS if info.get(key) is not None)
    return int(info["size"]), stamp, _stated_checksum(info)


def _stated_checksum(info: Mapping[str, Any]) -> tuple[str, str] | None:
    """The checksum in a listing: MD5 of Google Cloud Storage, or SHA-256 of the Hub. S3's ETag need not be one."""
    lfs = info.get("lfs")
    if isinstance(lfs, Mapping) and re.fullmatch(r"[0-9a-f]{64}", str(lfs.get("sha256"))):
        return "sha256", str(lfs["sha256"])
    with contextlib.suppress(ValueError):
        raw = base64.b64decode(str(info.get("md5Hash") or ""), validate=True)
        return ("md5", raw.hex()) if len(raw) == 16 else None
    return None
