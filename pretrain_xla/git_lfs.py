"""Detection of Git LFS pointers: three lines of text in place of a large file.

A repository of the Hub that was cloned without git-lfs has a pointer in place of each large file. A pointer is text, so that it
would be read as a document.
"""

from __future__ import annotations

from pretrain_xla.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024
"""Maximum size of a pointer in bytes, from its specification."""


def refuse_pointer(head: bytes, where: str) -> None:
    """Reject a file that is a pointer.

    Args:
        head: first bytes of the file.
        where: the file, for messages.

    Raises:
        UserError: the file is a pointer.
    """
    if head.startswith(POINTER):
        raise UserError(
            f"{where}: is only a Git LFS pointer to the file: run `git lfs install` and `git lfs pull` in its folder, or "
            "download it again"
        )


def refuse_pointer_at(path: str) -> None:
    """Reject a local file that is a pointer. A file that cannot be opened is not checked.

    Raises:
        UserError: the file is a pointer.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
    except OSError:
        return
    refuse_pointer(head, path)
