"""The format of a file of documents, by its name or else by its content.

| kind      | told by                                                              | documents                       |
|-----------|----------------------------------------------------------------------|---------------------------------|
| `parquet` | `.parquet`; begins with `PAR1`                                       | rows                            |
| `arrow`   | `.arrow`; begins with `ARROW1`                                       | rows                            |
| `lines`   | `.jsonl`, `.ndjson`; first lines are JSON objects, whatever its name | lines                           |
| `json`    | `.json` that begins with a list, or an object over several lines     | objects                         |
| `table`   | `.csv`, `.tsv`                                                       | rows                            |
| `tar`     | `ustar` at byte 257                                                  | those of its members            |
| `zip`     | `.zip`, or no suffix, and begins with `PK`                           | those of its members            |
| `text`    | UTF-8 without a NUL                                                  | see `readers/plain_text.py`     |

All but the first two and `zip` may be compressed, which is also recognised by the name or else by the first bytes.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from typing import Any, Literal, NamedTuple

from pretrain_xla.text.open_file import bare_name
from pretrain_xla.text.readers.delimited import SUFFIXES, has_column
from pretrain_xla.text.readers.json_records import field

Kind = Literal["parquet", "arrow", "lines", "json", "table", "tar", "zip", "text"]
WORDS: dict[Kind, str] = {
    "parquet": "Parquet",
    "arrow": "Arrow",
    "lines": "JSON lines",
    "json": "JSON",
    "table": "CSV or TSV",
    "tar": "tar",
    "zip": "zip",
    "text": "text",
}
RECORDS = ("parquet", "arrow", "lines", "json", "table")

_HEAD = 8192
_LONGEST_FIRST_LINE = 2**24  # bytes that are read to see whether a line is JSON
_LINES = 3  # that must be objects, if there are so many and the name is not that of JSON
_SMALL = 2**20  # bytes: a larger .json is not taken for metadata


class Look(NamedTuple):
    """What the first bytes of a file show."""

    kind: Kind | None
    head: bytes
    """What was read."""
    lacks_text: bool = False
    """Whether it is a single JSON object without the key that holds the text, or a table without that column."""
    is_card: bool = False
    """Whether it begins like a dataset card of the Hub."""


def kind_by_name(path: str) -> Kind | None:
    """The kind, if the name alone determines it."""
    name = path.lower()
    kinds: tuple[Kind, ...] = ("parquet", "arrow")
    for kind in kinds:
        if name.endswith(f".{kind}"):
            return kind
    name = bare_name(name)
    return "lines" if ".jsonl" in name or name.endswith(".ndjson") else None


def look(stream: Any, path: str, column: str) -> Look:
    """What a file is whose name does not determine its kind, by its first bytes.

    Args:
        stream: its bytes, decompressed.
        path: its name; the suffixes `.json`, `.csv`, `.tsv` and `.zip` matter.
        column: the key or column that holds the text.
    """
    head, name = _read(stream, _HEAD), bare_name(path.lower())
    if head.startswith((b"PAR1", b"ARROW1")):
        return Look("parquet" if head.startswith(b"PAR1") else "arrow", head)
    if head[257:262] == b"ustar":
        return Look("tar", head)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return Look("zip" if name.endswith(".zip") or "." not in name else None, head)
    if not _is_text(head):
        return Look(None, head)
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if name.endswith(".json") or begins.startswith(b"{"):
        return _look_at_json(stream, head, name, column)
    if name.endswith(SUFFIXES):
        line = re.split(rb"[\r\n]", head.removeprefix(codecs.BOM_UTF8))[0].decode(errors="replace")
        return Look("table", head, lacks_text=not has_column(line, column))
    return Look("text", head, is_card=name == "readme.md" and begins.startswith(b"---"))


def _look_at_json(stream: Any, head: bytes, name: str, column: str) -> Look:
    head += _read(stream, _SMALL - len(head))
    is_whole = len(head) < _SMALL
    while not is_whole and b"\n" not in head.lstrip() and len(head) < _LONGEST_FIRST_LINE:
        if not (more := _read(stream, _SMALL)):
            break
        head += more
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    lines = [line for line in text.split("\n") if line.strip()]
    objects = [_object(line) for line in (lines if is_whole else lines[:-1] or lines)[:_LINES]]
    first = objects[0] if objects else None
    if name.endswith(".json"):
        lone = _object(text) if is_whole else None
        lacks_text = lone is not None and not _has(lone, column)
        if first is not None:
            return Look("lines", head, lacks_text)
        return Look("json" if text.startswith(("{", "[")) else None, head, lacks_text)
    is_lines = first is not None and None not in objects and (len(objects) > 1 or _has(first, column))
    return Look("lines" if is_lines else "text", head)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _has(record: dict[str, Any], column: str) -> bool:
    try:
        field(record, column)
    except KeyError:
        return False
    return True


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without a NUL; a character may be cut off at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _read(stream: Any, count: int) -> bytes:
    """`count` bytes, or all that are left."""
    parts = io.BytesIO()
    while parts.tell() < count and (part := stream.read(count - parts.tell())):
        parts.write(part)
    return parts.getvalue()
