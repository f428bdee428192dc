"""The files of a path: one file, all files below a folder, or those that match a pattern; on any file system.

If a path exists, it is that file or folder, whatever characters are in it; otherwise `*`, `?` and `[...]` make it a pattern. On
local file systems, links to folders are followed. Entries that are not files (a broken link, a pipe) are left out, and the log
names them.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from fsspec.utils import glob_translate

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import is_local
from pretrain_xla.storage.remote import call

logger = logging.getLogger(__name__)


def find_files(fs: Any, root: str, asked: str) -> list[str]:
    """The files, in order of name. In a folder, names of files and folders that begin with a dot are left out.

    Args:
        fs: an fsspec file system.
        root: file, folder or pattern on it.
        asked: the same as the user wrote it, for errors.

    Raises:
        UserError: there is nothing, or a folder cannot be read.
    """
    kind = path_type(fs, root)
    if kind == "file":
        return [root]
    if kind == "directory":
        found = _walk(root, asked) if is_local(fs) else call(fs, "find", root)
        below = sorted(file for file in found if "/." not in file.removeprefix(root))
        if not below:
            raise UserError(f"{asked}: the folder has no files")
        return below
    if glob.has_magic(root):
        found = fitting(fs, root, asked)
        if not found:
            raise UserError(f"{asked}: no file matches this pattern")
        return sorted(found)
    if is_local(fs) and os.path.islink(root):
        raise UserError(f"{asked}: a link to {os.readlink(root)}, which does not exist")
    raise UserError(f"{asked}: no such file or folder{_hub_hint(asked)}")


def path_type(fs: Any, path: str) -> str | None:
    """`file` or `directory`. None means that there is nothing."""
    try:
        return str(call(fs, "info", path)["type"]) if not is_local(fs) else _local_type(path)
    except OSError:
        return None


def fitting(fs: Any, root: str, asked: str) -> dict[str, Any]:
    """Path → its entry in a listing (None if local), for each file that matches a pattern.

    Raises:
        UserError: a folder cannot be read.
    """
    folder, pattern = split_pattern(root, lambda path: path_type(fs, path) == "directory")
    if not is_local(fs):
        found = call(fs, "glob", f"{glob.escape(folder)}/{pattern}" if folder else pattern, detail=True)
        return {path: info for path, info in found.items() if info["type"] == "file"}
    fits = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern.count("/")
    files = _walk(folder or "/", asked, depth)
    return {path: None for path in files if fits(path.removeprefix(folder).lstrip("/"))}


def split_pattern(root: str, is_folder: Callable[[str], bool]) -> tuple[str, str]:
    """The longest existing folder that a pattern begins with, taken literally, and the pattern within it."""
    parts = root.split("/")
    count = 0
    while count < len(parts) - 1:
        if glob.has_magic(parts[count]) and not is_folder("/".join(parts[: count + 1])):
            break
        count += 1
    return "/".join(parts[:count]), "/".join(parts[count:])


def _local_type(path: str) -> str | None:
    if os.path.isdir(path):
        return "directory"
    return "file" if os.path.isfile(path) else None


def _walk(folder: str, asked: str, depth: int | None = None, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a local folder, `depth` folders down; a link to a folder above is not followed."""
    above, others = (*above, os.path.realpath(folder)), []
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{asked}: {folder} cannot be read: {error.strerror or error}") from None
    for entry in entries:
        path = f"{folder.rstrip('/')}/{entry.name}"
        if entry.is_dir():
            if depth != 0 and os.path.realpath(path) not in above:
                yield from _walk(path, asked, None if depth is None else depth - 1, above)
        elif entry.is_file():
            yield path
        elif depth is None:
            others.append(entry.name)
    if others:
        logger.warning(
            "%s: left out, since these are broken links or not files: %s", folder, ", ".join(sorted(others)[:3])
        )


def _hub_hint(asked: str) -> str:
    """A hint if the path looks like the name of a dataset on the Hub."""
    is_name = asked.count("/") == 1 and "." not in asked
    return f" (for the dataset of this name on the Hub: hf:{asked})" if is_name else ""
