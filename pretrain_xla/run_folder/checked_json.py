"""JSON files that carry a checksum of themselves, so that no changed byte goes unnoticed.

The checksum is the last key of the object, a CRC-32 of all bytes before it.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.untrusted import parse_object

_END = re.compile(rb', "checksum": (0|[1-9]\d{0,9})\}\Z')


def encode(tree: dict[str, Any]) -> bytes:
    """A JSON object, not empty and without a key `checksum`, as UTF-8 with its checksum."""
    body = json.dumps(tree).encode().removesuffix(b"}")
    return body + b', "checksum": %d}' % zlib.crc32(body)


def has_checksum(content: bytes) -> bool:
    """Whether the content ends in a checksum, right or wrong."""
    return _END.search(content) is not None


def decode(content: bytes) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: the checksum is missing or wrong, or it is not a JSON object; the text says which, in a few words.
    """
    end = _END.search(content)
    if end is None:
        raise ValueError("it is cut off or was not written by this package" if content else "it is empty")
    if zlib.crc32(content[: end.start()]) != int(end[1]):
        raise ValueError("its bytes are not those that were written")
    try:
        return parse_object(content[: end.start()] + b"}", "it")
    except UserError as error:
        raise ValueError(str(error)) from None
