"""Files that Git LFS left out: three lines that name a file, where the file itself should be.

A repository of the Hub that was cloned without git-lfs has such a pointer in the place of each large file. It is text, so that
what reads text would take it for a document.
"""

from __future__ import annotations

from pretrain_xla.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024
"""Bytes that a pointer has at most, by its specification."""


def refuse_pointer(head: bytes, where: str) -> None:
    """Refuse a file that begins as a pointer does.

    Args:
        head: its first bytes.
        where: the file, for messages.

    Raises:
        UserError: it is one.
    """
    if head.startswith(POINTER):
        raise UserError(
            f"{where}: is only Git LFS's pointer to the file: run `git lfs install` and `git lfs pull` in its folder, or "
            "fetch it anew"
        )


def refuse_pointer_at(path: str) -> None:
    """The same of a local file; one that cannot be read is left to its reader.

    Raises:
        UserError: it is one.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
    except OSError:
        return
    refuse_pointer(head, path)
