"""Documents read from files: text, records, archives, folders or patterns of them, on a disk or at any fsspec URL.

A file's format is recognised by its name and content (`recognise`). Files of a folder that are not data are left out
(`selection`). The log says once, before the first file is read, which files are left out, and which are read as another
format than their names say. Blank lines at either end of a document are dropped, and so are blank documents. Text files may
be compressed.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pretrain_xla import git_lfs
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted
from pretrain_xla.storage.files import VERSION_KEYS, filesystem, is_local, url
from pretrain_xla.storage.find import find_files, path_type
from pretrain_xla.storage.remote import REQUESTS_AT_A_TIME, call, concurrently
from pretrain_xla.storage.retries import describe
from pretrain_xla.text.archives import read_tar, read_zip
from pretrain_xla.text.open_file import UNPACK_ERRORS, bare_name, open_file, packing, unpacked
from pretrain_xla.text.readers.columns import read_column
from pretrain_xla.text.reading import Bad, BadDocuments, Reading
from pretrain_xla.text.recognise import WORDS, Kind, kind_by_name, look
from pretrain_xla.text.selection import TextFile, select
from pretrain_xla.text.streams import read_stream

logger = logging.getLogger(__name__)
_NAMED = 3  # files that the log names for each reason


class Document(NamedTuple):
    """A document, and its place in the source."""

    text: str
    place: Any
    """Where to resume after it: lists and numbers, which JSON can hold."""
    share: float | None = None
    """Fraction of the source that has been read with it, 0 to 1. None means that it is not known."""
    skipped: int = 0
    """Bad documents that were skipped before it; `prepare` counts them here."""


@dataclass(eq=False)
class TextFiles:
    """The files of a path: data, and those that are left out."""

    fs: Any
    root: str
    asked: str
    """The path as the user wrote it; `root` is what it is on the file system."""
    files: tuple[TextFile, ...]
    reading: Reading
    version: str
    """A checksum of the names, sizes and modification times (or ETags) of all files, and of the formats that their names do
    not say. It changes if a file is edited, added or removed."""
    _said: bool = field(default=False, init=False)

    @functools.cached_property
    def bad(self) -> BadDocuments:
        """Documents that could not be read."""
        return BadDocuments(self.reading.skips_bad)

    def read(self, place: Sequence[int] | None = None) -> Iterator[Document]:
        """The documents after a place (None means from the first one), in order of the files' names.

        Memory: the largest document, or some MB of a Parquet file.

        Raises:
            UserError: not UTF-8, not JSON, no such key or column, a damaged file, or no text at all.
        """
        self._say_once()
        begin = (place[0], place[1]) if place else (0, 0)
        total, before = sum(file.size for file in self.files) or 1, 0
        empty = begin == (0, 0)
        for index, file in enumerate(self.files):
            if index >= begin[0] and file.kind is not None:
                passed = begin[1] if index == begin[0] else 0
                for row, (text, share) in enumerate(self._texts(file, file.kind), start=1):
                    if row <= passed:
                        continue
                    if isinstance(text, Bad):
                        self.bad.meet(text)
                    elif document := cleaned(text):
                        empty = False
                        yield Document(document, [index, row], (before + share * file.size) / total)
            before += file.size
        if empty:
            skipped = f": all of its {self.bad.count:,} documents were skipped" if self.bad.count else ""
            raise UserError(f"{self.asked}: contains no text{skipped}")

    def _texts(self, file: TextFile, kind: Kind) -> Iterator[tuple[str | Bad, float]]:
        """(text, fraction of the file read so far) of each document of a file."""
        where = url(self.fs, file.path)
        try:
            with open_file(self.fs, file.path) as raw:
                if kind == "parquet" or kind == "arrow":
                    yield from read_column(raw, kind, where, self.reading.column)
                elif kind == "zip":
                    yield from read_zip(raw, where, self.reading)
                else:
                    # Its first bytes are checked even if its name gives the format: a .jsonl may be compressed.
                    stream = unpacked(raw, file.packing or packing(file.path, raw.peek(16)))
                    read = read_tar(stream, where, self.reading) if kind == "tar" else None
                    for text in read or read_stream(kind, stream, where, self.reading):
                        yield text, min(1.0, raw.tell() / (file.size or 1))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); convert it or remove it") from None
        except (OSError, *UNPACK_ERRORS) as error:
            raise UserError(f"{where}: cannot be read: {describe(error)}") from None

    def _say_once(self) -> None:
        """Log which files are read as another format than their names say, and which are left out."""
        if self._said:
            return
        self._said = True
        read, left_out = collections.defaultdict(list), collections.defaultdict(list)
        for file in self.files:
            name = file.path.removeprefix(self.root).lstrip("/") or file.path.rpartition("/")[2]
            if file.kind is None:
                left_out[file.why].append(name)
            elif file.kind != file.usual:
                read[WORDS[file.kind]].append(name)
        if read:
            logger.warning("%s: read as %s", redacted(self.asked), _listed(read))
        if left_out:
            count = sum(map(len, left_out.values()))
            logger.warning(
                "%s: %d of %d files left out: %s", redacted(self.asked), count, len(self.files), _listed(left_out)
            )


def open_text(path: str, reading: Reading | None = None) -> TextFiles:
    """The text of a file, of files that fit a pattern, or of every file of text below a folder.

    Looks at the first bytes of each file whose name does not give its format. In a folder, names that begin with a dot are
    left out, and files that are not data (`selection`).

    Args:
        path: file, folder, or pattern with `*`; a local path or an fsspec URL.
        reading: how documents are read from files.

    Raises:
        UserError: there are no files, or none that can be read.
    """
    reading = reading or Reading()
    fs, root = filesystem(path)
    paths = find_files(fs, root, path)
    threads = 1 if is_local(fs) else REQUESTS_AT_A_TIME
    found = concurrently(lambda file: _found(fs, file, reading.column), paths, threads)
    files = [file for file, _ in found]
    if len(files) == 1 and files[0].kind is None:
        raise UserError(f"{path}: {_fix(files[0])}")
    if path_type(fs, root) == "directory":
        files = select(files, root)
    checksum = hashlib.sha256()
    for file, changed in found:
        checksum.update(f"{file.path.removeprefix(root)}\0{file.size}\0{changed}\n".encode())
    for file in files:
        if file.kind != file.usual:
            checksum.update(f"{file.path.removeprefix(root)}\0{file.kind}\n".encode())
    return TextFiles(
        fs, root, path, tuple(files), reading, checksum.hexdigest()[:16] + (":lines" if reading.one_per_line else "")
    )


def read_documents(path: str, text_column: str = "text", place: Sequence[int] | None = None) -> Iterator[Document]:
    """The documents of a path; see `open_text` and `TextFiles.read`.

    Raises:
        UserError: there are no files (raised at once), or what reading them raises.
    """
    return open_text(path, Reading(text_column)).read(place)


def files_version(path: str) -> str:
    """See `TextFiles.version`.

    Raises:
        UserError: there are no files.
    """
    return open_text(path).version


def well_formed(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD. JSON's escapes can spell them; UTF-8 cannot encode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def utf8(text: str) -> bytes:
    """The text in UTF-8; lone surrogates become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def cleaned(text: str) -> str:
    """The text as a document: well-formed, without blank lines at either end; "" if nothing is left."""
    text = well_formed(text.strip("\r\n"))
    return "" if text.isspace() else text


def _found(fs: Any, path: str, column: str) -> tuple[TextFile, Any]:
    """A file by its name or first bytes, and its modification time or ETag."""
    info = call(fs, "info", path)
    changed = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    size = info.get("size") or 0
    if 0 < size <= git_lfs.LONGEST:
        try:
            with open_file(fs, path) as raw:
                git_lfs.refuse_pointer(raw.read(len(git_lfs.POINTER)), url(fs, path))
        except OSError as error:
            raise UserError(f"{url(fs, path)}: cannot be read: {error}") from None
    if kind := kind_by_name(path):
        return TextFile(path, size, kind, usual=_usual(path, kind)), changed
    where = url(fs, path)
    try:
        with open_file(fs, path) as raw:
            packed = packing(path, raw.peek(16))
            seen = look(unpacked(raw, packed), path, column)
    except (OSError, *UNPACK_ERRORS) as error:
        raise UserError(f"{where}: cannot be read: {describe(error)}") from None
    if packed and seen.kind in ("parquet", "arrow", "zip"):
        seen = seen._replace(kind=None)  # not seekable
    why = "" if seen.kind else "not text"
    usual = _usual(path, seen.kind) if packing(path, b"") == packed else None
    return TextFile(path, size, seen.kind, packed, usual, why, seen.lacks_text, seen.is_card), changed


def _usual(path: str, kind: Kind | None) -> Kind | None:
    """The format that the suffix implied before others were recognised; case matters. It keeps `version` stable."""
    name = bare_name(path)
    if path.endswith((".parquet", ".arrow")) or ".jsonl" in name or name.endswith(".ndjson"):
        return kind_by_name(path)
    if name.endswith(".json"):
        return "lines" if kind == "lines" else None
    return "text" if kind in ("text", "lines", "json", "table") else None


def _fix(file: TextFile) -> str:
    if bare_name(file.path).endswith(".json"):
        return "JSON, but neither a list nor objects: convert it to .jsonl, one object with the text a line"
    return "not UTF-8 text; give text, .jsonl, .json, .csv, .parquet, .arrow, .tar or .zip, or a folder of them"


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    """Each reason with its first names."""
    return "; ".join(
        f"{reason}: {', '.join(some[:_NAMED])}{f' and {len(some) - _NAMED:,} more' if len(some) > _NAMED else ''}"
        for reason, some in names.items()
    )
