"""Documents of .tar and .zip archives. Each member is read like a file on disk.

Nothing is unpacked to disk, so a member's name appears in messages and is never used as a path. A tar is read as a stream,
from start to end. The directory of a zip is at its end, so a zip needs a seekable file. Members that are not text and files
about the data are left out. An archive within an archive is read (OpenWebText is packed like that), except for zip and
Parquet, which cannot be streamed.
"""

from __future__ import annotations

import collections
import io
import logging
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.storage.retries import describe
from pretrain_xla.text.open_file import UNPACK_ERRORS, packing, unpacked
from pretrain_xla.text.reading import Bad, Reading
from pretrain_xla.text.recognise import kind_by_name, look
from pretrain_xla.text.selection import is_about
from pretrain_xla.text.streams import READERS, read_stream

logger = logging.getLogger(__name__)
_DEEPEST = 3  # archives within archives; no corpus nests deeper
_TAR_BLOCK = 512
_NAMES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_LONGEST_NAME = 2**20  # bytes, including the other fields of a PAX header


def read_zip(raw: Any, where: str, reading: Reading) -> Iterator[tuple[str | Bad, float]]:
    """(text, fraction of the file read so far) of each document of a zip.

    Args:
        raw: the open file.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: damaged, encrypted, or not seekable.
    """
    if not raw.seekable():
        raise UserError(
            f"{where}: the index of a .zip is at its end, and its server does not send ranges: copy it to a disk first"
        )
    notes = _LeftOut(where)
    try:
        with zipfile.ZipFile(raw) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            total = sum(member.compress_size for member in members) or 1
            done = 0
            for member in members:
                done += member.compress_size
                with archive.open(member) as stream:
                    for text in _member(stream, member.filename, where, reading, notes, 1):
                        yield text, done / total
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{where}: damaged ({_brief(error)}): fetch it again") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or an unknown compression
        raise UserError(f"{where}: cannot be read ({_brief(error)}): pack it again") from None
    notes.log()


def read_tar(stream: Any, where: str, reading: Reading) -> Iterator[str | Bad]:
    """The documents of a tar.

    Args:
        stream: its bytes, decompressed.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: damaged or truncated.
    """
    notes = _LeftOut(where)
    yield from _tar(stream, where, reading, notes, 1)
    notes.log()


def _tar(stream: Any, where: str, reading: Reading, notes: _LeftOut, depth: int) -> Iterator[str | Bad]:
    watched: Any = _Watched(stream)
    try:
        with tarfile.open(fileobj=watched, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                if member.isfile() and (inside := archive.extractfile(member)) is not None:
                    yield from _member(inside, member.name, where, reading, notes, depth)
    except tarfile.TarError as error:
        raise UserError(f"{where}: damaged ({_brief(error)}): fetch it again") from None
    while watched.read(2**20):  # to the end, where the compression has a checksum
        pass
    if watched.last.strip(b"\0"):
        raise UserError(f"{where}: truncated: the end of a tar is missing: fetch it again")


def _member(stream: Any, name: str, where: str, reading: Reading, notes: _LeftOut, depth: int) -> Iterator[str | Bad]:
    """The documents of one member."""
    place = f"{where}::{' '.join(name.split())}"
    hidden = any(part.startswith(".") and part.strip(".") for part in name.split("/"))
    if hidden or is_about(name):
        notes.add(name, "about the data, or hidden")
        return
    try:
        packed = packing(name, stream.peek(16))
        inner = unpacked(stream, packed)
        kind, head, lacks_text = kind_by_name(name), b"", False
        if kind is None:
            kind, head, lacks_text, _ = look(inner, name, reading.column)
        whole = io.BufferedReader(_Rejoined(head, inner), 2**20)
        if lacks_text:
            notes.add(name, "no such key or column in it")
        elif kind == "tar" and depth < _DEEPEST:
            yield from _tar(whole, place, reading, notes, depth + 1)
        elif kind in READERS:
            yield from read_stream(kind, whole, place, reading)
        else:
            notes.add(name, "not text, or not readable within an archive")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{place}: not UTF-8 text (byte 0x{byte:02x}); convert it, or take it out") from None
    except (OSError, *UNPACK_ERRORS) as error:
        raise UserError(f"{place}: cannot be read: {describe(error)}") from None


class _Member(tarfile.TarInfo):
    """A member with a limit on the length of its name, which `tarfile` would read into memory whatever its length."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAMES and self.size > _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


class _LeftOut:
    """Counts the members that are left out, and logs them once."""

    def __init__(self, where: str) -> None:
        self._where, self._first = where, ""
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, name: str, why: str) -> None:
        self._first = self._first or " ".join(name.split())
        self._counts[why] += 1

    def log(self) -> None:
        if self._counts:
            counts = ", ".join(f"{count} ({why})" for why, count in self._counts.items())
            logger.warning("%s: members left out: %s; the first: %s", self._where, counts, self._first)


class _Rejoined(io.RawIOBase):
    """A stream, preceded by the bytes that were already read from it."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = memoryview(head), stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._stream.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Watched:
    """A stream that keeps the last block that was read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.last = stream, b""

    def read(self, count: int) -> bytes:
        data: bytes = self._stream.read(count)
        self.last = (self.last + data)[-_TAR_BLOCK:] if len(data) < _TAR_BLOCK else data[-_TAR_BLOCK:]
        return data


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
