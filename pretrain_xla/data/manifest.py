"""`dataset.json`: the description of a dataset, written next to its shards when all of them are complete.

It has checksums of every shard, and of itself. Until it is written there is a `dataset.json.partial` instead. A folder that has
only that was left by an interrupted preparation, and is not trained on.
"""

from __future__ import annotations

import posixpath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pretrain_xla.errors import UserError
from pretrain_xla.storage.checked_json import CHECKSUM, is_intact, with_checksum
from pretrain_xla.storage.files import PARTIAL, filesystem, url, write_atomically
from pretrain_xla.storage.find import path_type
from pretrain_xla.storage.remote import call
from pretrain_xla.storage.retries import RefusedError
from pretrain_xla.untrusted import is_inside, parse_object

Model = TypeVar("Model", bound=BaseModel)
MANIFEST = "dataset.json"
UNFINISHED = MANIFEST + PARTIAL
SPLITS = ("train", "valid")


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError(f"{name!r} leads out of the dataset's folder")
    return name


def _one_name(name: str) -> str:
    if "/" in _inside(name):
        raise ValueError(f"{name!r} is not a name of a file or folder")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
"""A path below the dataset's folder."""
FileName = Annotated[str, AfterValidator(_one_name)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShardInfo(_Record):
    """One shard."""

    name: FileName
    """File name, in the folder of its split."""
    tokens: int
    max_id: int
    """Its highest token id: makes the check against the model's vocabulary free."""
    sha256: str
    """Checksum of the whole file."""
    crc32: str | None = None
    """Checksums of its blocks, see `block_checksums`; None in datasets from before they existed."""


class SplitInfo(_Record):
    """One split: a folder of shards."""

    documents: int
    tokens: int
    shards: tuple[ShardInfo, ...]


class Recipe(_Record):
    """All that the shards depend on. Equal recipes give equal bytes."""

    source: str
    """As the user named it; not compared."""
    source_version: str
    """See `Source.version`."""
    tokenizer: str
    """A name, a checksum of the file, or the settings of a tokenizer to be trained."""
    shard_size: int
    valid_fraction: float
    format: Literal["npy", "bin", "parquet"] = "npy"
    seed: int = 0

    def same(self, other: Recipe) -> bool:
        """Whether both recipes give the same dataset."""
        return self.model_copy(update={"source": other.source}) == other


class DatasetInfo(_Record):
    """A complete dataset."""

    version: Literal[1] = 1
    tokenizer: Inside
    """A name that `load_tokenizer` knows, or a file relative to the dataset's folder. Read `tokenizer_name` instead."""
    tokenizer_fingerprint: str | None = None
    """See `tokenizers/fingerprint.py`; None in datasets from before it existed."""
    vocab_size: int
    end_of_text: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[FileName, SplitInfo]
    skipped_documents: int = 0
    """Documents of the source that could not be read and were skipped at the user's request."""
    recipe: Recipe
    root: str = "."
    """The dataset's present folder; not stored."""

    @property
    def tokenizer_name(self) -> str:
        """The argument for `load_tokenizer`."""
        return f"{self.root}/{self.tokenizer}" if "/" in self.tokenizer else self.tokenizer


def dataset_info(directory: str) -> DatasetInfo | None:
    """The manifest of the dataset of which a folder is the root or a split. None means that it has none.

    Args:
        directory: a dataset's folder, or its `train/` or `valid/`; a local path or an fsspec URL.

    Raises:
        UserError: the manifest is damaged or of another version.
    """
    fs, root = filesystem(directory)
    if info := _read(fs, root):
        return info
    parent, name = posixpath.split(root)
    info = _read(fs, parent)
    return info if info and name in info.splits else None


def is_unfinished(fs: Any, directory: str) -> bool:
    """Whether a dataset's folder, or a split's, was left by an interrupted `prepare`."""
    return any(
        _exists(fs, f"{folder}/{UNFINISHED}") and not _exists(fs, f"{folder}/{MANIFEST}")
        for folder in (directory, posixpath.split(directory)[0])
    )


def _exists(fs: Any, path: str) -> bool:
    """fsspec's own answer is no whenever a bucket fails."""
    try:
        return path_type(fs, path) is not None
    except RefusedError:
        return False  # some servers refuse access to files that they do not have


def write_manifest(fs: Any, root: str, info: DatasetInfo) -> None:
    """Write the manifest of the dataset in folder `root`, atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_atomically(fs, f"{root}/{MANIFEST}", [with_checksum(info.model_dump(mode="json", exclude={"root"}))])


def _read(fs: Any, root: str) -> DatasetInfo | None:
    path = f"{root}/{MANIFEST}"
    if not root.strip("/") or root.rstrip("/").endswith(":"):  # above the root of a URL
        return None
    try:
        raw = call(fs, "cat_file", path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, RefusedError):
        return None  # some servers refuse access to files that they do not have
    where = url(fs, path)
    return parse_checked(DatasetInfo, raw, where, "prepare the dataset again").model_copy(
        update={"root": url(fs, root)}
    )


def parse_checked(model: type[Model], raw: bytes, where: str, fix: str) -> Model:
    """Parse the content of a file that `with_checksum` wrote, or that was written before it had a checksum.

    Args:
        model: what it holds.
        raw: the content.
        where: the file, for messages.
        fix: what to do if it is damaged.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        info, tree = model.model_validate_json(raw), parse_object(raw, where)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        why = fault["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: damaged ({key}: {why}): {fix}") from None
    intact = is_intact(tree)
    if intact is None and (unknown := tree.keys() - model.model_fields):
        raise UserError(f"{where}: damaged (unknown key {min(unknown)[:40]!r}, and no checksum): {fix}")
    if intact is False:
        raise UserError(
            f"{where}: differs from its own checksum: copy it again, or {fix}; after a change by hand, remove the key "
            f"{CHECKSUM!r}"
        )
    return info
