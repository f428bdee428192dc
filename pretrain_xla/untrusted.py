"""What is read of other people's files: JSON of any depth, and the names of files that it holds.

Nothing here runs code, follows a name out of its folder, or ends in a trace: each fault is a `UserError` of one line.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer


def parse_json(raw: str | bytes, where: str) -> Any:
    """The tree that a JSON text holds.

    Args:
        raw: the text; bytes are UTF-8, with or without a mark at their beginning.
        where: the file, for messages.

    Raises:
        UserError: no JSON, nested thousands deep, or a number of thousands of digits.
    """
    try:
        return json.loads(raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError:
        raise UserError(f"{where}: cannot be read: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        refuse_pointer(raw if isinstance(raw, bytes) else raw[:100].encode("utf-8", "replace"), where)
        raise UserError(
            f"{where}: cannot be read: not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: cannot be read: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read: {str(error).partition(';')[0]}") from None


def parse_object(raw: str | bytes, where: str) -> dict[str, Any]:
    """The same, of a text that must hold an object.

    Raises:
        UserError: also where it holds something else.
    """
    tree = parse_json(raw, where)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: holds no mapping of settings, but {type(tree).__name__}")
    return tree


def is_inside(name: str) -> bool:
    """Whether a name that a file gives for another one stays in the folder of the first: relative, without `..` or a protocol.

    A symbolic link of that name may lead elsewhere, as those of the Hub's cache do: whoever made the folder made the link.
    """
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    return not (
        posixpath.isabs(plain) or ".." in parts or "" in parts or "\0" in name or re.search(r"^\w+:|::|^~", plain)
    )
