"""Checksums of the shards of a folder: those of `dataset.json`, or of a `checksums.json` next to shards of other programs.

`prepare` writes the first. `inspect --write-checksums` writes the second, and completes a `dataset.json` from before there were
checksums of blocks. Without either, the only checks are those of formats and ids (see `dataset`), which miss most damage.
"""

from __future__ import annotations

import hashlib
import posixpath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pretrain_xla.data.block_checksums import block_checksums
from pretrain_xla.data.manifest import DatasetInfo, ShardInfo, dataset_info, parse_checked, write_manifest
from pretrain_xla.data.shards import Shard, read_sibling
from pretrain_xla.data.token_file import differs
from pretrain_xla.errors import UserError
from pretrain_xla.storage.checked_json import with_checksum
from pretrain_xla.storage.files import filesystem, url, write_atomically

CHECKSUMS = "checksums.json"
_BLOCK = 2**22  # bytes read at a time
_AGAIN = "run `inspect --write-checksums` again"


class ShardChecksums(BaseModel):
    """Content of `checksums.json`."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    shards: tuple[ShardInfo, ...]


def listed_shards(directory: str, info: DatasetInfo | None) -> dict[str, ShardInfo]:
    """Name → what is recorded of each shard of a folder; empty without `dataset.json` and `checksums.json`.

    Args:
        directory: the folder; a path or URL.
        info: the manifest, if there is one.

    Raises:
        UserError: `checksums.json` is damaged.
    """
    if info is not None:
        split = info.splits.get(posixpath.basename(directory))
        return {shard.name: shard for shard in split.shards} if split else {}
    raw = read_sibling(*filesystem(directory), CHECKSUMS)
    if raw is None:
        return {}
    found = parse_checked(ShardChecksums, raw, f"{directory}/{CHECKSUMS}", _AGAIN)
    return {shard.name: shard for shard in found.shards}


def verify_checksums(directory: str) -> None:
    """Read every shard that is recorded, and compare checksums; about half a second for each GB.

    Args:
        directory: a dataset's folder, one of its splits, or a folder of other shards.

    Raises:
        UserError: nothing is recorded, or a shard is missing or differs; the message names it.
    """
    info = dataset_info(directory)
    if info is not None:
        for split in info.splits:
            _verify(f"{info.root}/{split}", listed_shards(f"{info.root}/{split}", info), "dataset.json")
        return
    listed = listed_shards(directory, None)
    if not listed:
        raise UserError(
            f"{directory}: has no dataset.json, nor has the folder above, and no {CHECKSUMS}, so there are no checksums to "
            "compare with"
        )
    _verify(directory, listed, CHECKSUMS)


def write_checksums(directory: str, shards: tuple[Shard, ...], max_ids: dict[str, int]) -> str:
    """Record the checksums of all shards; about a second for each GB. Returns the path or URL of the file written.

    A dataset's `dataset.json` is completed, for all splits, after its shards were compared with it.

    Args:
        directory: a folder of shards, or one split of a dataset.
        shards: all shards of the folder, from `open_shard`.
        max_ids: name → highest id.

    Raises:
        UserError: a shard differs from the checksum in `dataset.json`, or the file cannot be written.
    """
    info = dataset_info(directory)
    if info is None:
        fs, root = filesystem(directory)
        made = tuple(_record(fs, root, _unrecorded(s, max_ids)) for s in shards)
        content = ShardChecksums(shards=made).model_dump(mode="json")
        write_atomically(fs, f"{root}/{CHECKSUMS}", [with_checksum(content)])
        return f"{directory}/{CHECKSUMS}"
    fs, root = filesystem(info.root)
    splits = {
        name: split.model_copy(update={"shards": tuple(_record(fs, f"{root}/{name}", shard) for shard in split.shards)})
        for name, split in info.splits.items()
    }
    write_manifest(fs, root, info.model_copy(update={"splits": splits}))
    return f"{info.root}/dataset.json"


def checksum_of(fs: Any, path: str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    checksum = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return checksum.hexdigest()


def _verify(directory: str, listed: dict[str, ShardInfo], source: str) -> None:
    fs, root = filesystem(directory)
    for shard in listed.values():
        path = f"{root}/{shard.name}"
        if not fs.isfile(path):
            raise UserError(f"{url(fs, path)}: missing, though {source} lists it: copy it again or prepare again")
        if checksum_of(fs, path) != shard.sha256:
            raise differs(url(fs, path))


def _unrecorded(shard: Shard, max_ids: dict[str, int]) -> ShardInfo:
    return ShardInfo(name=shard.name, tokens=shard.tokens, max_id=max_ids.get(shard.name, 0), sha256="")


def _record(fs: Any, folder: str, shard: ShardInfo) -> ShardInfo:
    """A shard's entry with both kinds of checksums."""
    path, checksum = f"{folder}/{shard.name}", hashlib.sha256()

    def parts(file: Any) -> Any:
        while block := file.read(_BLOCK):
            checksum.update(block)
            yield block

    with fs.open(path, "rb") as file:
        crc32 = block_checksums(parts(file))
    if shard.sha256 not in ("", checksum.hexdigest()):
        raise differs(url(fs, path))
    return shard.model_copy(update={"sha256": checksum.hexdigest(), "crc32": crc32})
