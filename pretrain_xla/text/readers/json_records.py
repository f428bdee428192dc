"""Documents of JSON: one object a line (`read_lines`), a list of objects, or objects over several lines (`read_values`).

`null` is not a document, as in Parquet. An object without the key, or with a value that is not a string, is a bad document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from pretrain_xla.errors import UserError
from pretrain_xla.text.open_file import LONGEST_LINE, lines_of
from pretrain_xla.text.reading import Bad, Reading, is_utf8

_BLOCK = 2**20  # characters that are read at a time
_LONGEST_TOKEN = 1000  # characters: an error this close to the end may only mean that more has to be read
_SKIP = "fix it, or leave such documents out with --skip-bad-documents"
_missing = object()


def read_lines(stream: IO[str], where: str, reading: Reading) -> Iterator[str | Bad]:
    """The document of each line; blank lines have none.

    Args:
        stream: the text.
        where: its name in error messages.
        reading: the user's options.
    """
    for number, line in enumerate(lines_of(stream, where), start=1):
        if line.isspace():
            continue
        place = f"{where}:{number}"
        if reading.skips_bad and not is_utf8(line):
            yield Bad(f"{place}: not UTF-8 text")
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield Bad(f"{place}: not JSON: {error.msg} (column {error.colno}): {_SKIP}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or such deep nesting
            yield Bad(f"{place}: cannot be read: {str(error).partition(';')[0]}: {_SKIP}")
        else:
            yield _text_of(record, place, reading.column)


def read_values(stream: IO[str], where: str, reading: Reading) -> Iterator[str | Bad]:
    """The document of each object of a list, or of objects one after the other.

    No more than a value and `_BLOCK` are in memory.

    Args:
        stream: the text.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: not JSON, since it is unknown where the next value begins.
    """
    for number, value in enumerate(_values(stream, where), start=1):
        yield _text_of(value, f"{where}: value {number}", reading.column)


def field(record: Any, key: str) -> Any:
    """The value of a key; `a.b` is the key `b` of the value of `a`, unless a key has that very name.

    Raises:
        KeyError: it has no such key.
    """
    if isinstance(record, dict) and key in record:
        return record[key]
    value = record
    for part in key.split("."):
        if value is None and value is not record:
            return None  # `a` is null, so `a.b` is, too
        if not isinstance(value, dict) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def _text_of(record: Any, place: str, key: str) -> str | Bad:
    try:
        value = field(record, key)
    except KeyError:
        found = f"its keys are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is not an object"
        return Bad(f"{place}: no key {key!r}: {found}; name the right one with --text-column")
    if value is None:
        return ""
    if not isinstance(value, str):
        return Bad(f"{place}: {key!r} is {type(value).__name__}, not a string")
    return value


def _values(stream: IO[str], where: str) -> Iterator[Any]:
    decode, text = json.JSONDecoder().raw_decode, _Window(stream)
    text.skip(" \t\r\n\ufeff")
    is_list = text.skip("[", most=1)
    while True:
        text.skip(" \t\r\n,")
        if is_list and text.skip("]", most=1):
            return
        if text.ended:
            break
        while True:
            try:
                value, end = decode(text.held, text.at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(text.held) - _LONGEST_TOKEN
                if not (cut and text.more()):
                    fault = f"ends within a value, or is not JSON ({error.msg})"
                    raise UserError(f"{where}: {fault}: fetch it again or convert it to .jsonl") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: cannot be read: {str(error).partition(';')[0]}") from None
        text.at = end
        yield value
    if is_list:
        raise UserError(f"{where}: truncated: its list has no end: fetch it again")


class _Window:
    """The part of a stream that is in memory; it doubles each time that it is not enough."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self.held, self.at = stream, "", 0

    @property
    def ended(self) -> bool:
        """Whether the stream is at its end."""
        return self.at >= len(self.held) and not self.more()

    def more(self) -> bool:
        """Read more; False at the end of the stream or if too much is held."""
        self.held, self.at = self.held[self.at :], 0
        if len(self.held) > LONGEST_LINE:
            return False
        read = self._stream.read(max(_BLOCK, len(self.held)))
        self.held += read
        return bool(read)

    def skip(self, signs: str, most: int | None = None) -> bool:
        """Skip characters; returns whether there were any."""
        passed = 0
        while passed != most and not self.ended and self.held[self.at] in signs:
            self.at += 1
            passed += 1
        return passed > 0
