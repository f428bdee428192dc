"""Reading JSON from untrusted files, and the file names in it.

Nothing here runs code or follows a file name out of its folder, and every error is a `UserError` of one line.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer


def parse_json(raw: str | bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        raw: the text; bytes are UTF-8, with or without a byte order mark.
        where: the file, for messages.

    Raises:
        UserError: not JSON, nested thousands deep, or a number with thousands of digits.
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
    """Parse JSON that must be an object.

    Raises:
        UserError: as `parse_json`, or the JSON is not an object.
    """
    tree = parse_json(raw, where)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(tree).__name__}")
    return tree


def is_inside(name: str) -> bool:
    """Whether a file name found in a file stays in that file's folder: relative, without `..` or a protocol.

    A symbolic link with that name may lead out of the folder, as in the Hub's cache, because the folder's owner made it.
    """
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    return not (
        posixpath.isabs(plain) or ".." in parts or "" in parts or "\0" in name or re.search(r"^\w+:|::|^~", plain)
    )
