"""The table of readers that need only a stream of a file's decompressed bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import IO, Any

from pretrain_xla.text.readers.delimited import read_table
from pretrain_xla.text.readers.json_records import read_lines, read_values
from pretrain_xla.text.readers.plain_text import read_text
from pretrain_xla.text.reading import Bad, Reading
from pretrain_xla.text.recognise import Kind

READERS: dict[Kind, Callable[[IO[str], str, Reading], Iterator[str | Bad]]] = {
    "text": read_text,
    "lines": read_lines,
    "json": read_values,
    "table": read_table,
}


def read_stream(kind: Kind, stream: Any, where: str, reading: Reading) -> Iterator[str | Bad]:
    """The documents of a file whose kind is in `READERS`.

    Args:
        kind: kind of the file.
        stream: its bytes.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: the content does not have that format.
        UnicodeDecodeError: not UTF-8, and bad documents are not skipped.
    """
    newline = "" if kind == "table" else None  # cells of a table keep their line ends
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors=reading.decoding, newline=newline) as text:
        yield from READERS[kind](text, where, reading)
