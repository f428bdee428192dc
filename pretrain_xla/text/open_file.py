"""A file opened for sequential reading, on any file system and with any supported compression.

A file in a bucket or on a web server is read in blocks, each requested with the retries of `remote`, so a broken connection
costs one block. A server without range requests cannot send the rest of a file: there a broken connection is an error that
says how to go on.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import IO, Any

import pyarrow as pa
import zstandard
from fsspec.implementations.http import HTTPFileSystem

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import is_local, url
from pretrain_xla.storage.remote import call, read_range
from pretrain_xla.storage.retries import describe, with_retries

BLOCK_BYTES = 2**22  # of a remote file in one request
LONGEST_LINE = 2**28
"""Characters of a line, and so of a record in JSON lines: 131 KB of a compressed file can hold ten billion."""
LONGEST_DOCUMENT = 2**30
"""Characters of a document in a text file, which is held in memory as one string; the largest one-file corpora have 10**9."""
_PACKED_AT_A_TIME = 2**12  # bytes of a .zst file with a long window: 128 MB of text at most
_USUAL_WINDOW = 2**27  # bytes of text in the window of a .zst file without `zstd --long`
UNPACK_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # and OSError: of a damaged compressed file
_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: _zstd(raw),
}
_MAGICS = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY", re.DOTALL),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}


def open_file(fs: Any, path: str) -> Any:
    """A file on any fsspec file system, opened for reading bytes.

    Raises:
        OSError: a local file that cannot be read.
        UserError: a remote file that cannot be opened; reading it raises the same.
    """
    if is_local(fs):
        return fs.open(path, "rb")
    size = call(fs, "info", path).get("size")
    # A bucket always supports range requests; a web server is tested with one.
    has_ranges = size is not None and (not isinstance(fs, HTTPFileSystem) or _gives_ranges(fs, path, size))
    return io.BufferedReader(_Ranges(fs, path, size) if has_ranges else _Stream(fs, path, size or 0), BLOCK_BYTES)


def unpacked(raw: Any, name: str) -> Any:
    """The content of an open file, decompressed if its name has the suffix of a compressed file, in upper or lower case.

    Reading it raises one of `UNPACK_ERRORS` or an OSError if the file is damaged or truncated.
    """
    return next((unpack(raw) for suffix, unpack in _UNPACKERS.items() if name.lower().endswith(suffix)), raw)


def lines_of(stream: IO[str], where: str) -> Iterator[str]:
    """The lines of a text with their ends.

    Raises:
        UserError: one has `LONGEST_LINE` characters or more.
    """
    while line := stream.readline(LONGEST_LINE):
        if len(line) >= LONGEST_LINE:
            raise UserError(f"{where}: a line of more than {LONGEST_LINE:,} characters: split it, or remove the file")
        yield line


def packing(name: str, head: bytes) -> str:
    """The suffix of a file's compression, by its name or else by its first bytes; "" if it is not compressed."""
    lower = name.lower()
    by_name = next((suffix for suffix in _UNPACKERS if lower.endswith(suffix)), "")
    return by_name or next((suffix for suffix, magic in _MAGICS.items() if magic.match(head)), "")


def bare_name(path: str) -> str:
    """A file's name without its folder and without the suffix of its compression."""
    name = path.rpartition("/")[2]
    return next((name[: -len(suffix)] for suffix in _UNPACKERS if name.lower().endswith(suffix)), name)


def _zstd(raw: Any) -> Any:
    """Arrow's reader refuses a file that ends within a frame, which those of `zstandard` do not, but it has no long windows."""
    head = raw.peek(18)[:18] if hasattr(raw, "peek") else raw.read(18)
    if not hasattr(raw, "peek"):
        raw.seek(0)
    try:
        window = zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:
        window = 0  # not a frame: Arrow raises the error
    if window <= _USUAL_WINDOW:
        return pa.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(_LongWindow(raw), BLOCK_BYTES)


class _LongWindow(io.RawIOBase):
    """A .zst file that was compressed with `zstd --long`, like the dumps of Reddit; takes up to 2 GB of memory."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._frame, self._waiting = raw, self._next_frame(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            packed = self._frame.unused_data if self._frame.eof else self._raw.read(_PACKED_AT_A_TIME)
            if self._frame.eof:
                packed = packed or self._raw.read(_PACKED_AT_A_TIME)
                if packed:
                    self._frame = self._next_frame()
            elif not packed:
                raise EOFError("Truncated: it ends within a frame")
            if not packed:
                return 0
            self._waiting = memoryview(self._frame.decompress(packed))
        taken = min(len(buffer), len(self._waiting))
        buffer[:taken], self._waiting = self._waiting[:taken], self._waiting[taken:]
        return taken

    def _next_frame(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _gives_ranges(fs: HTTPFileSystem, path: str, size: int) -> bool:
    def ask() -> bool:
        with fs.open(path, block_size=0, size=size, headers={"Range": "bytes=0-0"}) as answer:
            return bool(answer.r.status == HTTPStatus.PARTIAL_CONTENT)

    return with_retries(path, ask)


class _Ranges(io.RawIOBase):
    """A remote file that is read by range requests."""

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self._size, self._position = fs, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = read_range(self._fs, self._path, self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)


class _Stream(io.RawIOBase):
    """A remote file whose server has no range requests."""

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._where, self._size, self._position = url(fs, path), size, 0
        options = {"block_size": 0} if isinstance(fs, HTTPFileSystem) else {}
        self._file = self._tried(lambda: fs.open(path, "rb", **options))

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._tried(lambda: self._file.read(len(buffer)))
        if not data and self._position < self._size:
            raise self._broken(f"{self._position:,} of {self._size:,} bytes came")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # each library below has its own errors
            raise self._broken(describe(error)) from None

    def _broken(self, reason: str) -> UserError:
        return UserError(
            f"{self._where}: reading was interrupted ({reason}), and the server has no range requests: run the same "
            "command again, or copy the file to a disk first"
        )
