"""Documents of text files: one a file, several divided by lines of `<|endoftext|>`, or one a line."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import IO

from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted
from pretrain_xla.text.open_file import LONGEST_DOCUMENT, lines_of
from pretrain_xla.text.reading import Bad, Reading, is_utf8

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
START = "<|startoftext|>"
"""gpt-2-simple writes this before each text and `SEPARATOR` after it, on the same line as the text."""


def read_text(stream: IO[str], where: str, reading: Reading) -> Iterator[str | Bad]:
    """The documents of a text file.

    Args:
        stream: the text.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: a line or document is too long for memory.
    """
    lines = lines_of(stream, where)
    for line, text in enumerate(lines, start=1) if reading.one_per_line else _divided(lines, where):
        if reading.skips_bad and not is_utf8(text):
            yield Bad(f"{where}:{line}: not UTF-8 text")
        else:
            yield text


def _divided(lines: Iterator[str], where: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each document."""
    text, length, first, warned = io.StringIO(), 0, 1, False
    for number, line in enumerate(lines, start=1):
        if line.strip() == SEPARATOR:
            yield first, text.getvalue()
            text, length, first = io.StringIO(), 0, number + 1
            continue
        if not warned and (marker := _gpt_2_simple_marker(line)):
            warned = True
            logger.warning(
                "%s:%d: %s on the same line as text is ordinary text and divides nothing: write <|endoftext|> on a line of "
                "its own, and remove <|startoftext|>",
                redacted(where),
                number,
                marker,
            )
        length += text.write(line)
        if length > LONGEST_DOCUMENT:
            raise UserError(
                f"{where}: a document of more than {LONGEST_DOCUMENT:,} characters: divide it by lines of {SEPARATOR}"
            )
    yield first, text.getvalue()


def _gpt_2_simple_marker(line: str) -> str | None:
    """The marker of gpt-2-simple that a line of text begins or ends with."""
    if line.startswith(START):
        return START
    return SEPARATOR if line.rstrip().endswith(SEPARATOR) else None
