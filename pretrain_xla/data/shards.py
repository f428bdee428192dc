"""One shard: a `.npy` file with a row of token ids, uint16 where the vocabulary fits, else uint32.

NumPy writes and reads the same format, so that anyone's script can. A local shard is memory-mapped: opening one costs
nothing, and what is read lies in the page cache, shared by all processes of the machine. A remote one is read by
ranges.
"""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain_xla.data.files import filesystem, is_local, url, write_atomically
from pretrain_xla.data.manifest import ShardInfo, SplitInfo
from pretrain_xla.errors import UserError

SUFFIX = ".npy"
DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
_OVERFULL = 1.1  # the last shard may be this much larger, so that no tiny one comes after it
_LONGEST_HEADER = 4096
_OPEN_SHARDS = 256  # a mapped file holds a descriptor, and 1024 of these is a common limit


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary."""
    return DTYPES[0] if vocab_size <= 2**16 else DTYPES[1]


def write_shard(fs: Any, path: str, tokens: np.ndarray) -> ShardInfo:
    """Write a shard, whole or not at all.

    Args:
        fs: an fsspec file system.
        path: where, on that file system.
        tokens: [tokens], uint16 or uint32.

    Raises:
        UserError: it cannot be written.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    checksum = write_atomically(fs, path, [header.getvalue(), np.ascontiguousarray(tokens).data.cast("B")])
    return ShardInfo(
        name=path.rpartition("/")[2], tokens=len(tokens), max_id=int(tokens.max(initial=0)), sha256=checksum
    )


class ShardWriter:
    """Collects tokens, and writes a shard into its folder whenever there are enough.

    Every shard has `shard_size` tokens but the last, which has from a tenth of that to a tenth more.
    """

    def __init__(self, fs: Any, folder: str, dtype: np.dtype[Any], shard_size: int) -> None:
        self._fs, self._folder, self._shard_size = fs, folder, shard_size
        self._pending = [np.empty(0, dtype)]
        self._waiting = self._documents = 0
        self._shards: list[ShardInfo] = []

    def append(self, tokens: np.ndarray, documents: int) -> None:
        """Take the tokens of so many more documents; the type is the writer's."""
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
        """The shards so far, and the documents of all tokens so far."""
        tokens = sum(shard.tokens for shard in self._shards)
        return SplitInfo(documents=self._documents, tokens=tokens, shards=tuple(self._shards))

    def waiting(self) -> np.ndarray:
        """The tokens that are in no shard yet."""
        return np.concatenate(self._pending)

    def restore(self, written: SplitInfo, waiting: np.ndarray) -> None:
        """Take over where another writer was left."""
        self._shards, self._documents = list(written.shards), written.documents
        self._pending, self._waiting = [waiting], len(waiting)

    def close(self) -> SplitInfo:
        """Write what is left, and say what was written."""
        if self._waiting:
            self._write(np.concatenate(self._pending))
        return self.written

    def _write(self, tokens: np.ndarray) -> None:
        path = f"{self._folder}/{len(self._shards):06d}{SUFFIX}"
        self._shards.append(write_shard(self._fs, path, tokens))


@dataclass(frozen=True)
class Shard:
    """A shard whose header has been read and checked against the size of the file."""

    path: str
    """Local path, or URL."""
    name: str
    tokens: int
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first token."""
    stamp: tuple[int, ...] = ()
    """Inode and time of change: a file that was replaced is not taken for the one before."""

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Stretches of tokens, as stored: [len(starts), length].

        Args:
            starts: [stretches], position in the shard of each stretch's first token.
            length: tokens of a stretch.
        """
        if "://" in self.path:
            return self._fetch(starts, length)
        tokens, out = _mapped(self), np.empty((len(starts), length), self.dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = tokens[start : start + length]
        return out

    def _fetch(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Remote: one request for each stretch, many at a time; bounded memory, but no match for a local disk."""
        fs, path = filesystem(self.path)
        size = self.dtype.itemsize
        begins = [self.offset + start * size for start in starts.tolist()]
        raw = fs.cat_ranges([path] * len(begins), begins, [begin + length * size for begin in begins])
        return np.frombuffer(b"".join(raw), self.dtype).reshape(len(begins), length)


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _mapped(shard: Shard) -> np.ndarray:
    mapped = np.memmap(shard.path, shard.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,))
    return mapped.view(np.ndarray)  # slicing the subclass costs several times as much


def open_shard(fs: Any, path: str) -> Shard:
    """Read a shard's header, and check it against the size of the file.

    Raises:
        UserError: not a `.npy` file of one row of uint16 or uint32, or shorter or longer than its header says.
    """
    where = url(fs, path)
    try:
        size = int(fs.size(path))
        head = io.BytesIO(fs.cat_file(path, start=0, end=min(size, _LONGEST_HEADER)))
        stamp = _stamp(path) if is_local(fs) else ()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(head)
    except ValueError as error:
        raise UserError(
            f"{where}: not a whole .npy file ({' '.join(str(error).split())[:80]}): remove it or write it again"
        ) from None
    if dtype not in DTYPES or len(shape) != 1:
        raise UserError(f"{where}: holds {dtype}{list(shape)}; a shard is one row of uint16 or uint32: convert it")
    expected = head.tell() + shape[0] * dtype.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise UserError(
            f"{where}: {fault}: {size:,} bytes on disk where its header says {expected:,}: write it again or remove it"
        )
    return Shard(where, path.rpartition("/")[2], shape[0], dtype, head.tell(), stamp)


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns
