"""What a preparation has finished, so that a killed one can go on: `dataset.json.partial`, and parts of shards.

Whenever a shard is whole, the tokens that wait for the next shards are written to `unfinished/`, and then the journal:
which shards there are, which parts hold what waits, and where in the source to go on. The journal is replaced in one
move; what it does not name (a shard or part written after it) is written again, with the same bytes. What this costs: a
tenth more to write, and after a kill the time for one shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain_xla.data.manifest import UNFINISHED, FileName, Recipe, SplitInfo
from pretrain_xla.data.shards import ShardWriter, open_shard, write_shard
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import is_local, remove, write_atomically

PARTS = "unfinished"  # folder


class SplitProgress(BaseModel):
    """What there is of a split."""

    model_config = ConfigDict(frozen=True)

    written: SplitInfo
    parts: tuple[FileName, ...]
    """Files in `unfinished/` that hold, in this order, the tokens after the last shard."""
    waiting: int
    """Tokens in the parts."""


class Progress(BaseModel):
    """What there is of a dataset."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    place: Any = None
    """Where in the source to go on."""
    skipped: int = 0
    """Bad documents that were skipped before it."""
    splits: dict[FileName, SplitProgress] = {}
    """Empty until there is a shard."""


def read_progress(fs: Any, root: str) -> Progress | None:
    """What an interrupted preparation left; none where there is nothing, or nothing that can be used."""
    path = f"{root}/{UNFINISHED}"
    if not fs.isfile(path):
        return None
    try:
        return Progress.model_validate_json(fs.cat_file(path))
    except ValidationError:
        return None


class Journal:
    """Keeps the progress of a dataset in its folder.

    Args:
        fs: an fsspec file system.
        root: the dataset's folder on it.
        recipe: of the dataset.
        writers: split → writer.
    """

    def __init__(self, fs: Any, root: str, recipe: Recipe, writers: Mapping[str, ShardWriter]) -> None:
        self._fs, self._root, self._recipe, self._writers = fs, root, recipe, writers
        self._splits: dict[str, SplitProgress] = {}
        self._number = 0

    def restore(self, progress: Progress) -> bool:
        """Set the writers to where they were; false, and nothing is changed, where a file is missing or damaged."""
        waiting = {}
        try:
            for split, left in progress.splits.items():
                for shard in left.written.shards:
                    if open_shard(self._fs, f"{self._root}/{split}/{shard.name}").tokens != shard.tokens:
                        return False
                waiting[split] = np.concatenate([self._writers[split].waiting(), *map(self._read_part, left.parts)])
                if len(waiting[split]) != left.waiting:
                    return False
        except UserError:
            return False
        for split, left in progress.splits.items():
            self._writers[split].restore(left.written, waiting[split])
        self._splits = dict(progress.splits)
        parts = (part for left in self._splits.values() for part in left.parts)
        self._number = 1 + max((int(part.partition(".")[0]) for part in parts), default=-1)
        return True

    def due(self) -> bool:
        """Whether a shard was finished since the last entry."""
        return any(writer.written.shards != self._shards(split) for split, writer in self._writers.items())

    def enter(self, place: Any, skipped: int = 0) -> None:
        """Write down what there is.

        Args:
            place: where in the source to go on; the writers have everything before it.
            skipped: bad documents before it.

        Raises:
            UserError: the folder cannot be written.
        """
        before = {part for left in self._splits.values() for part in left.parts}
        self._splits = {split: self._save(split, writer) for split, writer in self._writers.items()}
        progress = Progress(recipe=self._recipe, place=place, skipped=skipped, splits=self._splits)
        write_atomically(self._fs, f"{self._root}/{UNFINISHED}", [progress.model_dump_json(indent=2).encode()])
        kept = {part for left in self._splits.values() for part in left.parts}
        remove(self._fs, [self._part(name) for name in before - kept])

    def _shards(self, split: str) -> tuple[Any, ...]:
        return self._splits[split].written.shards if split in self._splits else ()

    def _save(self, split: str, writer: ShardWriter) -> SplitProgress:
        """Write the tokens that wait to a part: those that are new, or all, once the parts have gone into a shard."""
        tokens, left = writer.waiting(), self._splits.get(split)
        parts, saved = (
            ((), 0) if left is None or left.written.shards != writer.written.shards else (left.parts, left.waiting)
        )
        if len(tokens) > saved:
            name = f"{self._number:06d}.{split}.npy"
            self._number += 1
            write_shard(self._fs, self._part(name), tokens[saved:])
            parts = (*parts, name)
        return SplitProgress(written=writer.written, parts=parts, waiting=len(tokens))

    def _read_part(self, name: str) -> np.ndarray:
        shard = open_shard(self._fs, self._part(name))
        return shard.gather(np.array([0]), shard.tokens)[0]

    def _part(self, name: str) -> str:
        return f"{self._root}/{PARTS}/{name}"


def write_start(fs: Any, root: str, recipe: Recipe) -> None:
    """Mark a dataset as unfinished, with nothing in it yet.

    Raises:
        UserError: the folder cannot be written.
    """
    write_atomically(fs, f"{root}/{UNFINISHED}", [Progress(recipe=recipe).model_dump_json(indent=2).encode()])


def clear_journal(fs: Any, root: str) -> None:
    """Remove the parts, and the journal last.

    Raises:
        UserError: a file cannot be removed.
    """
    folder = f"{root}/{PARTS}"
    if fs.isdir(folder):
        remove(fs, fs.ls(folder, detail=False))
        if is_local(fs):  # a bucket has no folders
            os.rmdir(folder)
    remove(fs, [f"{root}/{UNFINISHED}"])
