"""Finds shards: those of a folder, those that match a pattern with `*`, or one file; on any file system.

Other programs keep training and validation shards in one folder and distinguish them by name (`fineweb_train_000001.bin` and
`fineweb_val_000000.bin`, `train.bin` and `val.bin`). If the names have both, each split takes its own, and the same folder
can be given for both. Otherwise all are taken.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Mapping
from typing import Any, Literal

from pretrain_xla.data.formats import SUFFIXES, is_shard
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import is_local
from pretrain_xla.storage.find import fitting
from pretrain_xla.storage.remote import call

Split = Literal["train", "valid"]
_WORDS = {"train": {"train", "training"}, "valid": {"val", "valid", "validation", "test", "dev"}}
_OTHERS: dict[tuple[str, ...], str] = {
    (
        ".mds",
        ".mds.zstd",
    ): "a shard of MosaicML's streaming, which is not supported: prepare the text that it was made from",
    (".zstd.bin",): "a compressed chunk of litdata, which is not supported: write it without compression",
    (
        ".tfrecord",
        ".tfrecords",
        ".array_record",
    ): "a file of records, which is not supported: prepare the text that it was made from",
    (
        ".arrow",
    ): "Arrow: if it has input_ids, `to_parquet` of `datasets` makes shards of it; if it has text, prepare it",
    (
        ".pt",
        ".pth",
        ".npz",
        ".pkl",
        ".h5",
        ".safetensors",
    ): "not a stream of token ids: save them as one row with np.save",
    (
        ".txt",
        ".jsonl",
        ".json",
        ".csv",
        ".gz",
        ".zst",
        ".xz",
        ".bz2",
    ): "text: `prepare` makes shards of it",
}


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern."""
    return "*" in path


def find_shards(fs: Any, root: str, asked: str, split: Split | None) -> tuple[str, dict[str, Mapping[str, Any] | None]]:
    """The folder of the shards, and path → its entry in the listing (None if local), in order of name.

    Args:
        fs: an fsspec file system.
        root: folder, file or pattern on it.
        asked: the same as the user wrote it, for errors.
        split: which files to use if their names distinguish splits. None means all.

    Raises:
        UserError: there is nothing, there are no shards, or a shard belongs to neither split by its name.
    """
    found = _listing(fs, root, asked)
    files = {path: info for path, info in sorted(found.items()) if is_shard(path)}
    if not files:
        inside = [word for word in ("train", "valid") if f"{root}/{word}" in found]
        hint = f"; did you mean {asked.rstrip('/')}/{inside[0]}?" if inside else f": {_others(list(found))}"
        raise UserError(f"{asked}: no token shards ({', '.join(SUFFIXES)}) in it{hint}")
    folder = root if root not in files and not is_pattern(root) else posixpath.dirname(next(iter(files)))
    return folder, {path: files[path] for path in _of_split(list(files), split, asked)}


def _others(paths: list[str]) -> str:
    """What to do about files that are not shards."""
    for path in paths:
        what = next((what for suffixes, what in _OTHERS.items() if path.lower().endswith(suffixes)), None)
        if what:
            return f"{posixpath.basename(path)} is {what}"
    return "prepare a dataset there"


def _listing(fs: Any, root: str, asked: str) -> dict[str, Mapping[str, Any] | None]:
    if not is_local(fs):
        fs.invalidate_cache()
    try:
        if is_pattern(root):
            found = fitting(fs, root, asked)
            if not found:
                raise UserError(f"{asked}: no file matches this pattern")
            return found
        # Not every web server that has a file also lists it.
        own = call(fs, "info", root) if is_shard(root) else None
        entries = [own] if own and own["type"] == "file" else call(fs, "ls", root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        near = _near(fs, root, asked)
        hint = f"; did you mean {near}?" if near else ": `python -m pretrain_xla prepare` makes one"
        raise UserError(f"{asked}: no such folder of token shards{hint}") from None
    except OSError as error:
        raise UserError(f"{asked}: cannot be read: {error.strerror or error}") from None
    return {entry["name"].rstrip("/"): None if is_local(fs) else entry for entry in entries}


def _near(fs: Any, root: str, asked: str) -> str | None:
    """The folder that was probably meant: the same split by another name, or a similar spelling."""
    parent, name = posixpath.split(root.rstrip("/"))
    try:
        siblings = [posixpath.basename(entry.rstrip("/")) for entry in call(fs, "ls", parent or ".", detail=False)]
    except (OSError, ValueError):  # the parent is missing, too, or has no listing
        return None
    split = next((words for words in _WORDS.values() if name.lower() in words), set())
    found = [one for one in siblings if one.lower() in split] or difflib.get_close_matches(name, siblings, n=1)
    return f"{posixpath.dirname(asked.rstrip('/')) or '.'}/{found[0]}" if found else None


def _of_split(paths: list[str], split: Split | None, asked: str) -> list[str]:
    words = {path: set(re.split(r"[^a-z]+", posixpath.basename(path).lower())) for path in paths}
    named = {side: [path for path in paths if words[path] & _WORDS[side]] for side in _WORDS}
    if split is None or not (named["train"] and named["valid"]):
        return paths
    for path in paths:
        sides = [side for side in named if path in named[side]]
        if len(sides) != 1:
            raise UserError(
                f"{path}: its name says neither training nor validation, as the others in {asked} do: rename it, "
                "or give a pattern such as '*train*' that leaves it out"
            )
    return named[split]
