"""Records the progress of `prepare`, so that it can be resumed after a kill: `dataset.json.partial` and `unfinished/`.

Whenever a shard is complete, the tokens buffered for the next shards are written to files in `unfinished/`. Then the journal is
written: which shards there are, which files hold the buffered tokens, and where in the source to resume. The journal is
replaced atomically; what it does not list (written after it) is written again, with the same bytes. This costs a tenth more
writing, and a kill costs the time for one shard.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pretrain_xla.data.checksums import checksum_of
from pretrain_xla.data.manifest import UNFINISHED, FileName, Recipe, SplitInfo, parse_checked
from pretrain_xla.data.shards import ShardWriter, open_shard, write_shard
from pretrain_xla.data.token_file import differs
from pretrain_xla.errors import UserError
from pretrain_xla.storage.checked_json import with_checksum
from pretrain_xla.storage.files import is_local, remove, url, write_atomically

PARTS = "unfinished"  # folder


class SplitProgress(BaseModel):
    """The shards of a split so far, and the tokens after them."""

    model_config = ConfigDict(frozen=True)

    written: SplitInfo
    parts: tuple[FileName, ...]
    """Files in `unfinished/` that hold, in this order, the tokens buffered after the last shard."""
    waiting: int
    """Number of tokens in `parts`."""
    checksums: tuple[str, ...] = ()
    """SHA-256 of each of `parts`."""


class Progress(BaseModel):
    """An unfinished dataset, and where to resume."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    place: Any = None
    """Where in the source to resume."""
    skipped: int = 0
    """Bad documents skipped before `place`."""
    splits: dict[FileName, SplitProgress] = {}
    """Empty until the first shard is complete."""


def read_progress(fs: Any, root: str) -> Progress | None:
    """The progress of an interrupted preparation; None where there is none, or it is damaged."""
    path = f"{root}/{UNFINISHED}"
    if not fs.isfile(path):
        return None
    with contextlib.suppress(UserError):
        return parse_checked(Progress, fs.cat_file(path), url(fs, path), "start again")
    return None


class Journal:
    """Writes the progress of a dataset to its folder.

    Args:
        fs: an fsspec file system.
        root: the dataset's folder on it.
        recipe: of the dataset.
        writers: the shard writer of each split.
    """

    def __init__(self, fs: Any, root: str, recipe: Recipe, writers: Mapping[str, ShardWriter]) -> None:
        self._fs, self._root, self._recipe, self._writers = fs, root, recipe, writers
        self._splits: dict[str, SplitProgress] = {}
        self._number = 0

    def restore(self, progress: Progress) -> bool:
        """Restore the writers; False, with nothing changed, where a file is missing or damaged."""
        waiting = {}
        try:
            for split, saved in progress.splits.items():
                for shard in saved.written.shards:
                    if open_shard(self._fs, f"{self._root}/{split}/{shard.name}").tokens != shard.tokens:
                        return False
                pairs = zip(saved.parts, saved.checksums, strict=True)
                waiting[split] = np.concatenate(
                    [self._writers[split].waiting(), *itertools.starmap(self._read_part, pairs)]
                )
                if len(waiting[split]) != saved.waiting:
                    return False
        except (UserError, ValueError):  # ValueError: from before there were checksums
            return False
        for split, saved in progress.splits.items():
            self._writers[split].restore(saved.written, waiting[split])
        self._splits = dict(progress.splits)
        parts = (part for saved in self._splits.values() for part in saved.parts)
        self._number = 1 + max((int(part.partition(".")[0]) for part in parts), default=-1)
        return True

    def due(self) -> bool:
        """Whether a shard was completed since the last entry."""
        return any(writer.written.shards != self._shards(split) for split, writer in self._writers.items())

    def enter(self, place: Any, skipped: int = 0) -> None:
        """Write an entry.

        Args:
            place: where in the source to resume; the writers have received everything before it.
            skipped: bad documents before it.

        Raises:
            UserError: the folder cannot be written.
        """
        before = {part for saved in self._splits.values() for part in saved.parts}
        self._splits = {split: self._save(split, writer) for split, writer in self._writers.items()}
        progress = Progress(recipe=self._recipe, place=place, skipped=skipped, splits=self._splits)
        _write(self._fs, self._root, progress)
        kept = {part for saved in self._splits.values() for part in saved.parts}
        remove(self._fs, [self._part(name) for name in before - kept])

    def _shards(self, split: str) -> tuple[Any, ...]:
        return self._splits[split].written.shards if split in self._splits else ()

    def _save(self, split: str, writer: ShardWriter) -> SplitProgress:
        """Write the buffered tokens to a new part: those not saved yet, or all, once the old parts are in a shard."""
        tokens, before = writer.waiting(), self._splits.get(split)
        parts: tuple[str, ...] = ()
        checksums: tuple[str, ...] = ()
        saved = 0
        if before is not None and before.written.shards == writer.written.shards:
            parts, checksums, saved = before.parts, before.checksums, before.waiting
        if len(tokens) > saved:
            name = f"{self._number:06d}.{split}.npy"
            self._number += 1
            made = write_shard(self._fs, self._part(name), tokens[saved:])
            parts, checksums = (*parts, name), (*checksums, made.sha256)
        return SplitProgress(written=writer.written, parts=parts, waiting=len(tokens), checksums=checksums)

    def _read_part(self, name: str, checksum: str) -> np.ndarray:
        if checksum_of(self._fs, self._part(name)) != checksum:
            raise differs(name)
        shard = open_shard(self._fs, self._part(name))
        return shard.gather(np.array([0]), shard.tokens)[0]

    def _part(self, name: str) -> str:
        return f"{self._root}/{PARTS}/{name}"


def write_start(fs: Any, root: str, recipe: Recipe) -> None:
    """Mark a dataset as unfinished, before anything is written.

    Raises:
        UserError: the folder cannot be written.
    """
    _write(fs, root, Progress(recipe=recipe))


def _write(fs: Any, root: str, progress: Progress) -> None:
    write_atomically(fs, f"{root}/{UNFINISHED}", [with_checksum(progress.model_dump(mode="json"))])


def clear_journal(fs: Any, root: str) -> None:
    """Remove `unfinished/`, and the journal last.

    Raises:
        UserError: a file cannot be removed.
    """
    folder = f"{root}/{PARTS}"
    if fs.isdir(folder):
        remove(fs, fs.ls(folder, detail=False))
        if is_local(fs):  # a bucket has no folders
            os.rmdir(folder)
    remove(fs, [f"{root}/{UNFINISHED}"])
