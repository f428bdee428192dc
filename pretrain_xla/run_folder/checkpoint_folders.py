"""The folders `step_00001000` under a root: listing them, and removing one safely."""

from __future__ import annotations

import os
import re

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint_index import INDEX
from pretrain_xla.run_folder.checkpoint_marker import MARKER
from pretrain_xla.storage.files import filesystem, is_local
from pretrain_xla.storage.remote import call

PREFIX = "step_"
# Files that DCP and we write; a folder with any other file is not removed.
PARTS = re.compile(
    rf"(\.metadata|{re.escape(MARKER)}|{re.escape(INDEX)}|__\d+_\d+\.(distcp|part\.json))(\.partial|\.tmp)?"
)


def step_of(name: str) -> int | None:
    """The step in a folder's name. None means that it is not a checkpoint's name."""
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else None


class CheckpointFolders:
    """Folders of checkpoints, complete or not.

    root: path or URL, as the user wrote it. files: its fsspec file system.

    Raises:
        UserError: a URL with an unknown scheme.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        try:
            self.files, self._path = filesystem(self.root)
        except UserError as error:
            raise UserError(f"checkpoints_dir={error}") from None

    def url(self, step: int) -> str:
        """A step's folder as path or URL, for messages and for DCP."""
        return f"{self.root}/{PREFIX}{step:08d}"

    def path(self, step: int) -> str:
        """A step's folder on `files`."""
        return f"{self._path}/{PREFIX}{step:08d}"

    def marker(self, step: int) -> str:
        """A step's marker on `files`."""
        return f"{self.path(step)}/{MARKER}"

    def all(self) -> list[int]:
        """Steps of the folders, ascending. A bucket that does not answer is asked again for a while, as by all that reads data.

        Raises:
            UserError: they cannot be listed.
        """
        try:
            there = call(self.files, "exists", self._path)
            found = call(self.files, "ls", self._path, detail=False) if there else []
        except OSError as error:  # the bucket does not exist, or access is denied
            raise UserError(f"checkpoints_dir={self.root} cannot be listed: {error}") from None
        steps = (step_of(entry.rstrip("/").rsplit("/", 1)[-1]) for entry in found)
        return sorted(step for step in steps if step is not None)

    def marked(self) -> list[int]:
        """Steps of the folders that have a marker, ascending."""
        return [step for step in self.all() if call(self.files, "exists", self.marker(step))]

    def is_remainder(self, step: int) -> bool:
        """Whether a folder has no marker and only files of a checkpoint: left by an interrupted write or removal."""
        if self._is_link(step):
            return False
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.files.ls(self.path(step), detail=False)}
        return MARKER not in names and all(PARTS.fullmatch(name) for name in names)

    def remove_marker(self, step: int) -> None:
        """Remove the marker of a folder, if there is one: it is no checkpoint any more. A symbolic link is removed itself."""
        if self._is_link(step):
            os.unlink(self.path(step))
        elif self.files.exists(self.marker(step)):
            self.files.rm(self.marker(step))

    def remove(self, step: int) -> None:
        """Remove a folder if it exists; if it is a symbolic link, only the link."""
        if self._is_link(step):
            os.unlink(self.path(step))  # its target is not ours
            return
        # The marker goes first, so that a half-removed folder is never taken for a checkpoint.
        for path in (self.marker(step), self.path(step)):
            if self.files.exists(path):  # a bucket has no empty folders
                self.files.rm(path, recursive=True)

    def _is_link(self, step: int) -> bool:
        return is_local(self.files) and os.path.islink(self.path(step))
