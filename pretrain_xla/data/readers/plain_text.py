"""Documents of text files: one, or several where lines that say `<|endoftext|>` divide it, or one a line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from pretrain_xla.data.open_file import LONGEST_DOCUMENT, lines_of
from pretrain_xla.data.reading import Bad, Reading, is_utf8
from pretrain_xla.errors import UserError

SEPARATOR = "<|endoftext|>"


def read_text(stream: IO[str], where: str, reading: Reading) -> Iterator[str | Bad]:
    """The documents of a text file.

    Args:
        stream: the text.
        where: what to call it in an error.
        reading: what the person says.

    Raises:
        UserError: a line or document that is too long to stand in memory.
    """
    lines = lines_of(stream, where)
    for line, text in enumerate(lines, start=1) if reading.one_per_line else _divided(lines, where):
        if reading.skips_bad and not is_utf8(text):
            yield Bad(f"{where}:{line}: not UTF-8 text")
        else:
            yield text


def _divided(lines: Iterator[str], where: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document."""
    text, length, first = io.StringIO(), 0, 1
    for number, line in enumerate(lines, start=1):
        if line.strip() == SEPARATOR:
            yield first, text.getvalue()
            text, length, first = io.StringIO(), 0, number + 1
            continue
        length += text.write(line)
        if length > LONGEST_DOCUMENT:
            raise UserError(
                f"{where}: a document of more than {LONGEST_DOCUMENT:,} characters: divide it by lines that say {SEPARATOR}"
            )
    yield first, text.getvalue()
