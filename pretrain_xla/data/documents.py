"""Documents out of files: text, JSON lines, Parquet, Arrow, whole folders or patterns of them, on a disk or at any fsspec URL.

A text file is one document, or several where lines that say `<|endoftext|>` divide it. `.jsonl`, `.parquet` and `.arrow`
files have one document for each record, under a key or in a column (`text`, unless told otherwise). Blank lines at either
end of a document are dropped, and so is a document that is nothing else. Text and JSON lines may be packed, which is told
from the name (`.gz`, `.bz2`, `.xz`, `.zst`).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from fsspec.compression import compr
from fsspec.utils import infer_compression

from pretrain_xla.data.columns import COLUMN_SUFFIXES, read_column
from pretrain_xla.data.files import filesystem, url
from pretrain_xla.errors import UserError

SEPARATOR = "<|endoftext|>"

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """A document, and where it stands."""

    text: str
    place: Any
    """Where reading goes on after it: made of lists and numbers, so that JSON can hold it."""
    share: float | None = None
    """How much of the source has been read with it, 0 to 1; none where that is not known."""


def read_documents(path: str, text_column: str = "text", place: Sequence[int] | None = None) -> Iterator[Document]:
    """The documents of a file, of files that fit a pattern, or of every file of text below a folder, by their names' order.

    Files that are not text are left out with a note in the log when they were found in a folder. Names that begin
    with a dot are left out. Memory: the largest document, or some MB of a Parquet file.

    Args:
        path: file, folder, or pattern with `*`; a local path or an fsspec URL.
        text_column: key or column that holds the text, in files of records.
        place: a document's `place`, to go on after it; none: from the start.

    Raises:
        UserError: nothing there (at once); not UTF-8, not JSON, no such key or column, a damaged file, or no text at
            all (when reading gets there).
    """
    fs, root = filesystem(path)
    return _read(fs, _files(fs, root, path), path, text_column, (place[0], place[1]) if place else (0, 0))


def files_version(path: str) -> str:
    """A checksum over names, sizes and times of change (or ETags) of the files that `read_documents` would read.

    Reads no file, so that it is quick at any size; an edited, added or removed file gives another version.

    Raises:
        UserError: nothing there.
    """
    fs, root = filesystem(path)
    checksum = hashlib.sha256()
    for file in _files(fs, root, path):
        info = fs.info(file)
        changed = next((info[key] for key in ("etag", "ETag", "md5Hash", "mtime") if info.get(key)), "")
        checksum.update(f"{file.removeprefix(root)}\0{info.get('size')}\0{changed}\n".encode())
    return checksum.hexdigest()[:16]


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can hold but JSON's escapes can, replaced by U+FFFD."""
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
    """The text as a document: well-formed, without blank lines at its ends; "" where nothing is left."""
    text = well_formed(text.strip("\n"))
    return "" if text.isspace() else text


def _files(fs: Any, root: str, path: str) -> list[str]:
    if fs.isfile(root):
        return [root]
    if glob.has_magic(root):
        found = sorted(file for file in fs.glob(root) if fs.isfile(file))
        if not found:
            raise UserError(f"{path}: no file fits this pattern")
        return found
    if not fs.isdir(root):
        # Two names and one slash are how datasets on the Hub are called.
        hub = (
            f" (for the dataset of this name on the Hub: hf:{path})" if path.count("/") == 1 and "." not in path else ""
        )
        raise UserError(f"{path}: no such file or folder{hub}")
    below = [file for file in sorted(fs.find(root)) if "/." not in file.removeprefix(root)]
    if not below:
        raise UserError(f"{path}: the folder has no files")
    return below


def _read(fs: Any, files: list[str], path: str, column: str, place: tuple[int, int]) -> Iterator[Document]:
    sizes = [fs.size(file) or 0 for file in files]
    total = sum(sizes) or 1
    skipped, empty = [], place == (0, 0)
    for index in range(place[0], len(files)):
        file, where, before = files[index], url(fs, files[index]), sum(sizes[:index])
        passed = place[1] if index == place[0] else 0
        try:
            if not _has_records(file) and not _is_text(fs, file):
                skipped.append(where)
                continue
            for row, (text, share) in enumerate(_file_texts(fs, file, where, column), start=1):
                if row > passed and (document := cleaned(text)):
                    empty = False
                    yield Document(document, [index, row], (before + share * sizes[index]) / total)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); convert it, or take it out") from None
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            raise UserError(f"{where}: cannot be read: {error}") from None
    if skipped:
        if len(files) == 1:
            raise UserError(f"{skipped[0]}: not UTF-8 text; give text, .jsonl, .parquet or .arrow, or a folder of them")
        logger.warning("%s: %d files that are not text were left out (%s ...)", path, len(skipped), skipped[0])
    if empty:
        raise UserError(f"{path}: there is no text in it")


def _zstd_error() -> type[Exception]:
    import zstandard  # late, as only packed text needs it

    error: type[Exception] = zstandard.ZstdError
    return error


def _is_lines(file: str) -> bool:
    return ".jsonl" in file.rpartition("/")[2]


def _has_records(file: str) -> bool:
    return _is_lines(file) or file.endswith(COLUMN_SUFFIXES)


def _file_texts(fs: Any, file: str, where: str, column: str) -> Iterator[tuple[str, float]]:
    """(text, share of the file that has been read) of each document of a file."""
    with fs.open(file, "rb") as raw:
        if file.endswith(COLUMN_SUFFIXES):
            yield from read_column(raw, where, column)
            return
        size = fs.size(file) or 1
        with io.TextIOWrapper(_unpacked(raw, file), encoding="utf-8-sig") as stream:
            for text in _records(stream, where, column) if _is_lines(file) else _texts(stream):
                yield text, min(1.0, raw.tell() / size)


def _unpacked(raw: Any, file: str) -> Any:
    compression = infer_compression(file)
    return compr[compression](raw, mode="rb") if compression else raw


def _is_text(fs: Any, file: str) -> bool:
    """Whether the first bytes are UTF-8 without a NUL; a cut character at the end is forgiven."""
    with fs.open(file, "rb", compression="infer") as stream:
        head = stream.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _texts(stream: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in stream:
        if line.strip() == SEPARATOR:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _records(stream: IO[str], where: str, key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number}: not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(record, dict) or key not in record:
            found = f"its keys are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise UserError(f"{where}:{number}: no key {key!r}: {found}; name the right one with --text-column")
        if not isinstance(record[key], str):
            raise UserError(f"{where}:{number}: {key!r} is {type(record[key]).__name__}, not a string")
        yield record[key]
