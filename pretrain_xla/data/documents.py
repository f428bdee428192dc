"""Documents out of files: text, JSON lines, Parquet, Arrow, whole folders or patterns of them, on a disk or at any fsspec URL.

A text file is one document, or several where lines that say `<|endoftext|>` divide it. `.jsonl`, `.ndjson`, `.parquet` and
`.arrow` files have one document for each record, under a key or in a column (`text`, unless told otherwise), and so has a
`.json` file whose first line is a whole object. Blank lines at either end of a document are dropped, and so is a document
that is nothing else. Text and JSON lines may be packed, which is told from the name (`.gz`, `.bz2`, `.xz`, `.zst`).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

from pretrain_xla.data.columns import COLUMN_SUFFIXES, read_column
from pretrain_xla.data.files import VERSION_KEYS, filesystem, url
from pretrain_xla.data.open_file import LONGEST_DOCUMENT, UNPACK_ERRORS, bare_name, lines_of, open_file, unpacked
from pretrain_xla.data.remote import call
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted

SEPARATOR = "<|endoftext|>"
_LONGEST_FIRST_LINE = 2**24  # characters that are looked at to tell what a .json file is

Kind = Literal["columns", "lines", "text"]
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
        info = call(fs, "info", file)
        changed = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
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
    kind = _type(fs, root)
    if kind == "file":
        return [root]
    if glob.has_magic(root):
        found = sorted(file for file, info in call(fs, "glob", root, detail=True).items() if info["type"] == "file")
        if not found:
            raise UserError(f"{path}: no file fits this pattern")
        return found
    if kind != "directory":
        # Two names and one slash are how datasets on the Hub are called.
        hub = (
            f" (for the dataset of this name on the Hub: hf:{path})" if path.count("/") == 1 and "." not in path else ""
        )
        raise UserError(f"{path}: no such file or folder{hub}")
    below = [file for file in sorted(call(fs, "find", root)) if "/." not in file.removeprefix(root)]
    if not below:
        raise UserError(f"{path}: the folder has no files")
    return below


def _type(fs: Any, path: str) -> str | None:
    try:
        return str(call(fs, "info", path)["type"])
    except OSError:
        return None


def _read(fs: Any, files: list[str], path: str, column: str, place: tuple[int, int]) -> Iterator[Document]:
    sizes = [call(fs, "info", file).get("size") or 0 for file in files]
    total = sum(sizes) or 1
    skipped: list[str] = []
    empty = place == (0, 0)
    for index in range(place[0], len(files)):
        file, where, before = files[index], url(fs, files[index]), sum(sizes[:index])
        passed = place[1] if index == place[0] else 0
        try:
            kind = _kind(fs, file)
            if kind is None:
                skipped.append(where)
                continue
            for row, (text, share) in enumerate(_file_texts(fs, file, kind, where, sizes[index], column), start=1):
                if row > passed and (document := cleaned(text)):
                    empty = False
                    yield Document(document, [index, row], (before + share * sizes[index]) / total)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); convert it, or take it out") from None
        except (OSError, *UNPACK_ERRORS) as error:
            raise UserError(f"{where}: cannot be read: {error}") from None
    if skipped:
        if len(files) == 1:
            raise UserError(f"{skipped[0]}: {_mend(skipped[0])}")
        logger.warning(
            "%s: %d files that are not text or JSON lines were left out (%s ...)",
            redacted(path),
            len(skipped),
            redacted(skipped[0]),
        )
    if empty:
        raise UserError(f"{path}: there is no text in it")


def _mend(file: str) -> str:
    if bare_name(file).endswith(".json"):
        return "JSON, but not one object a line: make .jsonl of it, as `jq -c '.[]'` does of a list"
    return "not UTF-8 text; give text, .jsonl, .parquet or .arrow, or a folder of them"


def _kind(fs: Any, file: str) -> Kind | None:
    """What a file holds, by its name, and by its beginning where the name does not say; none: nothing to be read."""
    name = bare_name(file)
    if file.endswith(COLUMN_SUFFIXES):
        return "columns"
    if ".jsonl" in name or name.endswith(".ndjson"):
        return "lines"
    if name.endswith(".json"):
        return "lines" if _begins_with_object(fs, file) else None
    return "text" if _is_text(fs, file) else None


def _file_texts(fs: Any, file: str, kind: Kind, where: str, size: int, column: str) -> Iterator[tuple[str, float]]:
    """(text, share of the file that has been read) of each document of a file."""
    with open_file(fs, file) as raw:
        if kind == "columns":
            yield from read_column(raw, where, column)
            return
        with io.TextIOWrapper(unpacked(raw, file), encoding="utf-8-sig") as stream:
            for text in _records(stream, where, column) if kind == "lines" else _texts(stream, where):
                yield text, min(1.0, raw.tell() / (size or 1))


def _begins_with_object(fs: Any, file: str) -> bool:
    with open_file(fs, file) as raw, io.TextIOWrapper(unpacked(raw, file), encoding="utf-8-sig") as stream:
        try:
            return isinstance(json.loads(stream.readline(_LONGEST_FIRST_LINE)), dict)
        except (ValueError, RecursionError):
            return False


def _is_text(fs: Any, file: str) -> bool:
    """Whether the first bytes are UTF-8 without a NUL; a cut character at the end is forgiven."""
    with open_file(fs, file) as raw:
        head = unpacked(raw, file).read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _texts(stream: IO[str], where: str) -> Iterator[str]:
    text, length = io.StringIO(), 0
    for line in lines_of(stream, where):
        if line.strip() == SEPARATOR:
            yield text.getvalue()
            text, length = io.StringIO(), 0
            continue
        length += text.write(line)
        if length > LONGEST_DOCUMENT:
            raise UserError(
                f"{where}: a document of more than {LONGEST_DOCUMENT:,} characters: divide it by lines that say {SEPARATOR}"
            )
    yield text.getvalue()


def _records(stream: IO[str], where: str, key: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(stream, where), start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number}: not JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
            raise UserError(f"{where}:{number}: cannot be read: {str(error).partition(';')[0]}") from None
        if not isinstance(record, dict) or key not in record:
            found = f"its keys are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise UserError(f"{where}:{number}: no key {key!r}: {found}; name the right one with --text-column")
        if not isinstance(record[key], str):
            raise UserError(f"{where}:{number}: {key!r} is {type(record[key]).__name__}, not a string")
        yield record[key]
