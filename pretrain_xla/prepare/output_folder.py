"""The folder that `prepare` writes to: what is already in it, what may be replaced, and a lock against a second `prepare`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain_xla.data.formats import WRITTEN_SUFFIXES
from pretrain_xla.data.manifest import MANIFEST, SPLITS, UNFINISHED, DatasetInfo, Recipe, dataset_info
from pretrain_xla.data.shards import open_shard
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.journal import Progress, clear_journal, read_progress
from pretrain_xla.storage.files import (
    PARTIAL,
    filesystem,
    is_local,
    make_folder,
    missing_folders,
    remove,
    remove_empty,
    url,
)
from pretrain_xla.tokenizers.checksums import CHECKSUMS_FILE
from pretrain_xla.tokenizers.load import known_tokenizers
from pretrain_xla.tokenizers.tokenizer import SPECIALS_FILE, TOKENIZER_FILES

TOKENIZER_FOLDER = "tokenizer"
"""The dataset's own copy of its tokenizer, where that is a file."""


@dataclass(frozen=True)
class OutputFolder:
    """The folder of a dataset; it need not exist yet."""

    fs: Any
    """An fsspec file system."""
    root: str
    """The folder on it."""

    @property
    def url(self) -> str:
        """Path or URL of the folder, for messages and for opening."""
        return url(self.fs, self.root)

    @property
    def tokenizer(self) -> str:
        """Path or URL of the folder of the tokenizer's copy."""
        return f"{self.url}/{TOKENIZER_FOLDER}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuse a second `prepare` in a local folder until this one ends; buckets have no locks.

        The lock is on the folder itself, so that no file remains, and the operating system releases it when the process ends.
        """
        if not is_local(self.fs):
            yield
            return
        made = missing_folders(self.root)
        if made:
            make_folder(self.fs, self.root)
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no such locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"{self.root}: another process is preparing a dataset there: wait until it has ended"
                    ) from None
            yield
        except BaseException:
            remove_empty(made)
            raise
        finally:
            os.close(descriptor)

    def finished(self, recipe: Recipe, overwrite: bool) -> DatasetInfo | None:
        """The complete dataset of this recipe, if it is there; None where the folder may be written to.

        Raises:
            UserError: the folder holds another dataset, or files that `prepare` did not write.
        """
        info = dataset_info(self.url) if self.fs.isfile(f"{self.root}/{MANIFEST}") else None
        if info and info.recipe.same(recipe):
            if not self._is_complete(info):
                return None
            clear_journal(self.fs, self.root)  # still there only if the very last step was interrupted
            return info
        if overwrite:
            return None
        if info:
            changes = _changes(info.recipe, recipe)
            raise UserError(
                f"{self.url}: holds a dataset made otherwise ({changes}): choose another folder or --overwrite"
            )
        if not self.fs.exists(f"{self.root}/{UNFINISHED}") and (files := [*self.shards(), *self._tokenizer_files()]):
            raise UserError(f"{files[0]}: not written by `prepare`, nor finished: choose another folder or --overwrite")
        return None

    def unfinished(self, recipe: Recipe, overwrite: bool) -> Progress | None:
        """The progress of an interrupted preparation of this recipe; None where there is none to resume.

        Raises:
            UserError: the folder holds an unfinished dataset of another recipe.
        """
        progress = None if self.fs.isfile(f"{self.root}/{MANIFEST}") else read_progress(self.fs, self.root)
        if progress is None or not progress.splits:
            return None
        if progress.recipe.same(recipe):
            return progress
        if not overwrite:
            raise UserError(
                f"{self.url}: holds the shards of an unfinished dataset ({_changes(progress.recipe, recipe)}): "
                "give the old command again to finish it, choose another folder, or --overwrite"
            )
        return None

    def refuse_tokenizer_inside(self, tokenizer: str | None) -> None:
        """Refuse a tokenizer in the place of the dataset's own copy, because `prepare` removes what it writes there.

        Raises:
            UserError: the tokenizer is there.
        """
        if tokenizer is None or tokenizer in known_tokenizers():
            return
        other, path = filesystem(tokenizer)
        given, own = url(other, path), self.tokenizer
        if is_local(self.fs) and is_local(other):
            given, own = os.path.realpath(given), os.path.realpath(own)
        if f"{given}/".startswith(f"{own}/"):
            raise UserError(
                f"tokenizer {tokenizer!r}: lies where the dataset keeps its own copy: move it to another folder"
            )

    def shards(self) -> list[str]:
        """Paths of all shards, partly written ones included."""
        folders = [f"{self.root}/{split}" for split in SPLITS if self.fs.isdir(f"{self.root}/{split}")]
        files = [path for folder in folders for path in self.fs.ls(folder, detail=False)]
        return [path for path in files if path.removesuffix(PARTIAL).endswith(WRITTEN_SUFFIXES)]

    def clear(self) -> None:
        """Remove manifest, shards and tokenizer, and nothing that `prepare` does not write."""
        remove(self.fs, [f"{self.root}/{MANIFEST}", *self.shards(), *self._tokenizer_files()])

    def clear_unless_resumable(self) -> bool:
        """After a failure: whether there are shards that the next run can resume from; if not, remove everything."""
        with contextlib.suppress(UserError, OSError):
            progress = read_progress(self.fs, self.root)
            if progress is not None and progress.splits:
                return True
            self.clear()
            clear_journal(self.fs, self.root)
            if is_local(self.fs):  # a bucket has no empty folders
                remove_empty(f"{self.root}/{folder}" for folder in (*SPLITS, TOKENIZER_FOLDER))
        return False

    def _is_complete(self, info: DatasetInfo) -> bool:
        """Whether every shard is there with as many tokens as the manifest says."""
        try:
            return all(
                open_shard(self.fs, f"{self.root}/{split}/{shard.name}").tokens == shard.tokens
                for split, listed in info.splits.items()
                for shard in listed.shards
            )
        except UserError:
            return False

    def _tokenizer_files(self) -> list[str]:
        paths = (f"{self.root}/{TOKENIZER_FOLDER}/{file}" for file in (*TOKENIZER_FILES, SPECIALS_FILE, CHECKSUMS_FILE))
        return [path for path in paths if self.fs.exists(path)]


def _changes(old: Recipe, new: Recipe) -> str:
    before, after = old.model_dump(), new.model_dump()
    return ", ".join(f"{key} {before[key]!r} → {after[key]!r}" for key in before if before[key] != after[key])
