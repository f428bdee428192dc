"""JSON files that hold a checksum of themselves, so that a damaged one is not taken for another's content.

The checksum is the key `checksum`: the SHA-256 of all other keys, written in one fixed way. So it does not depend on line ends
or indentation, and a file that was changed by hand is accepted after its `checksum` is removed. `parse_intact` is for files
that nobody changes by hand: there, not even a space may differ, because a disk that loses one may lose more.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.untrusted import parse_object

CHECKSUM = "checksum"


def with_checksum(tree: dict[str, Any]) -> bytes:
    """The content of a file: the tree and its checksum.

    Args:
        tree: plain values, as `json.loads` returns them.
    """
    return json.dumps(tree | {CHECKSUM: _checksum_of(tree)}, indent=2).encode()


def is_intact(tree: dict[str, Any]) -> bool | None:
    """Whether a file's content has the checksum that it states. None means that it states none.

    Args:
        tree: the parsed file.
    """
    return None if CHECKSUM not in tree else bool(tree[CHECKSUM] == _checksum_of(tree))


def parse_intact(content: bytes) -> dict[str, Any]:
    """The tree in a file that `with_checksum` wrote, without its checksum.

    Raises:
        ValueError: a byte differs, or it states no checksum; the text says which, in a few words.
    """
    tree = parse_json_object(content)
    if not (intact := is_intact(tree)):
        raise ValueError("it has no checksum" if intact is None else "it is not what was written: its checksum differs")
    del tree[CHECKSUM]
    if content != with_checksum(tree):
        raise ValueError("it is not byte for byte what was written")
    return tree


def parse_json_object(content: bytes) -> dict[str, Any]:
    """A file's content, with or without a checksum.

    Raises:
        ValueError: it is not a JSON object; the text says so in a few words.
    """
    if not content.rstrip().endswith(b"}"):
        raise ValueError("it is cut off, or is not a JSON object" if content else "it is empty")
    try:
        return parse_object(content, "it")
    except UserError as error:
        raise ValueError(str(error)) from None


def _checksum_of(tree: dict[str, Any]) -> str:
    others = {key: value for key, value in tree.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
