"""Documents out of files: plain text, JSON lines, whole folders, packed or not, on a disk or at any fsspec URL.

A text file is one document, or several where lines that say `<|endoftext|>` divide it. A `.jsonl` file has one document
for each line, under the key `text`. Blank lines at either end of a document are dropped, and so is a document that is
nothing else. Compression is told from the name (`.gz`, `.bz2`, `.xz`, `.zst` where its package is installed).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from typing import IO, Any

from pretrain_xla.data.files import filesystem, url
from pretrain_xla.errors import UserError

SEPARATOR = "<|endoftext|>"

logger = logging.getLogger(__name__)


def read_documents(path: str) -> Iterator[str]:
    """The documents of a file, or of every file of text below a folder, in the order of their names.

    Files that are not text are left out with a note in the log when they were found in a folder. Names that begin
    with a dot are left out. Memory: the largest document.

    Args:
        path: file or folder; a local path or an fsspec URL.

    Raises:
        UserError: nothing there (at once); not UTF-8, not JSON, no key `text`, a damaged archive, or no text at all
            (when reading gets there).
    """
    fs, root = filesystem(path)
    return _read(fs, _files(fs, root, path), path)


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


def _files(fs: Any, root: str, path: str) -> list[str]:
    if fs.isfile(root):
        return [root]
    if not fs.isdir(root):
        raise UserError(f"{path}: no such file or folder")
    below = [file for file in sorted(fs.find(root)) if "/." not in file.removeprefix(root)]
    if not below:
        raise UserError(f"{path}: the folder has no files")
    return below


def _read(fs: Any, files: list[str], path: str) -> Iterator[str]:
    skipped, empty = [], True
    for file in files:
        where = url(fs, file)
        try:
            is_records = ".jsonl" in file.rpartition("/")[2]
            if not is_records and not _is_text(fs, file):
                skipped.append(where)
                continue
            with fs.open(file, "rt", encoding="utf-8-sig", compression="infer") as stream:
                for document in _records(stream, where) if is_records else _texts(stream):
                    document = well_formed(document.strip("\n"))
                    if document and not document.isspace():
                        empty = False
                        yield document
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); convert it, or take it out") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where}: cannot be read: {error}") from None
    if skipped:
        if len(files) == 1:
            raise UserError(f"{skipped[0]}: not UTF-8 text; give a text or .jsonl file, or a folder of them")
        logger.warning("%s: %d files that are not text were left out (%s ...)", path, len(skipped), skipped[0])
    if empty:
        raise UserError(f"{path}: there is no text in it")


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


def _records(stream: IO[str], where: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number}: not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(record, dict) or "text" not in record:
            found = f"its keys are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise UserError(f"{where}:{number}: no key 'text': {found}")
        if not isinstance(record["text"], str):
            raise UserError(f"{where}:{number}: 'text' is {type(record['text']).__name__}, not a string")
        yield record["text"]
