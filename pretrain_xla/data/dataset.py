"""Shards that are trained on together, checked when the run starts rather than when a bad shard is reached.

What is checked, when, and what it costs:

- Headers against file sizes: at the start. It costs nothing on a disk, and a small request for each remote shard, sixteen at
  a time.
- Ids against the vocabulary, at the start: by the maxima of the manifest or of the file, for free. Without them (shards of
  other programs), up to `SCANNED_TOKENS` tokens are read, in some seconds at most: all of a small dataset, both ends of each
  shard of a large one, and nothing of a remote one. So a wrong tokenizer is found at once.
- Ids against the vocabulary, whenever tokens are read, at about 1% of the time of reading. So no id out of range reaches the
  device, where training would silently go on.
- Checksums, if they are recorded (see `checksums`): of each shard when it is opened, ahead of use (see `shard_loader`), of the
  blocks that are read if it is read by ranges, and of all shards on request (`verify_checksums`).
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from pretrain_xla.config import DataConfig
from pretrain_xla.data.block_checksums import decode
from pretrain_xla.data.checksums import CHECKSUMS, listed_shards
from pretrain_xla.data.find_shards import Split, find_shards, is_pattern
from pretrain_xla.data.manifest import DatasetInfo, ShardInfo, dataset_info, is_unfinished
from pretrain_xla.data.shard_loader import ShardLoader
from pretrain_xla.data.shards import Shard, fetch, narrow, open_shard
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, is_local, url
from pretrain_xla.storage.remote import REQUESTS_AT_A_TIME, concurrently, read_range

SCANNED_TOKENS = 2**28


@dataclass(frozen=True)
class TokenDataset:
    """Readable shards in order of name."""

    directory: str
    shards: tuple[Shard, ...]
    vocab_size: int
    info: DatasetInfo | None
    """The manifest, if there is one."""
    listed: Mapping[str, ShardInfo] = field(default_factory=dict)
    """Name → what is recorded of each shard, in the manifest or in `checksums.json`."""
    settings: DataConfig = field(default_factory=DataConfig)
    is_whole: bool = True
    """Whether it has all shards of the folder."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def loader(self) -> ShardLoader:
        """Loads the shards."""
        return ShardLoader(self.shards, {name: shard.sha256 for name, shard in self.listed.items()}, self.settings)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the names, lengths and content of the shards, in whatever folder, which a resumed run compares.

        Content means the manifest's checksums; without a manifest, the first and last 4096 tokens of each shard.
        """
        checksums = {name: shard.sha256 for name, shard in self.listed.items()} if self.info is not None else {}
        sampled = [shard for shard in self.shards if shard.name not in checksums]
        checksums |= dict(zip([s.name for s in sampled], concurrently(_sample_checksum, sampled), strict=True))
        lines = [f"{s.name} {s.tokens} {checksums[s.name]}" for s in self.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def read(self, shards: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Read ranges of tokens: int32 [rows, length].

        Args:
            shards: [rows] index of the shard of each range.
            starts: [rows] position of its first token in the shard.
            length: tokens of a range.

        Raises:
            UserError: a token id is outside the vocabulary, or a shard cannot be read or is damaged.
        """
        out = np.empty((len(shards), length), np.int32)
        far = np.zeros(len(shards), bool)
        for number in np.unique(shards).tolist():
            here = shards == number
            tokens = self.loader.tokens(number)
            if tokens is None:
                far |= here
                continue
            out[here] = narrow(tokens.rows(starts[here], length))
        if far.any():
            rows = np.empty((int(far.sum()), length), np.int32)
            fetch([self.shards[number] for number in shards[far].tolist()], starts[far], rows)
            out[far] = rows
        # As unsigned, so that an id that does not fit into int32 is out of range, too.
        if out.size and int(out.view(np.uint32).max()) >= self.vocab_size:
            ids = out.view(np.uint32).max(axis=1)
            _check_ids(self.shards[int(shards[ids.argmax()])], int(ids.max()), self.vocab_size)
        return out

    def gather(self, shard: int, starts: np.ndarray, length: int) -> np.ndarray:
        """The same for one shard."""
        return self.read(np.full(len(starts), shard), starts, length)


def open_dataset(
    directory: str,
    seq_length: int,
    vocab_size: int,
    *,
    split: Split | None = None,
    settings: DataConfig | None = None,
) -> TokenDataset:
    """Open a folder of shards, and check all that can be checked without reading all of it (see the module).

    Args:
        directory: the folder, `.../train` for instance, or a file, or a pattern with `*`; local, or an fsspec URL.
        seq_length: tokens of a training sequence; a shard must hold one, and the token after it.
        vocab_size: number of ids that the model has.
        split: which files to use if their names distinguish training and validation. None means all.
        settings: where and how to keep remote shards.

    Raises:
        UserError: there is no folder, there are no shards, the dataset is unfinished, or a shard is missing, truncated, too
            short, of another type, or from another vocabulary; the message names the file and the fix.
    """
    dataset = open_shards(directory, vocab_size, split=split, settings=settings)
    for shard in dataset.shards:
        if shard.tokens < seq_length + 1:
            raise UserError(
                f"{shard.path}: {shard.tokens:,} tokens are too few for seq_length={seq_length} (it takes "
                f"{seq_length + 1:,}): remove it, lower seq_length, or prepare more text"
            )
    highest: dict[str, int | None] = {shard.name: shard.max_id for shard in dataset.shards}
    highest.update(listed_max_ids(dataset))
    for shard in dataset.shards:
        if vocab_size <= np.iinfo(shard.dtype).max:
            most = highest[shard.name]
            if most is None and shard.format != "parquet" and not shard.is_remote:
                most = _scan(shard, SCANNED_TOKENS // len(dataset.shards))
            _check_ids(shard, most or 0, vocab_size)
    return dataset


def open_shards(
    directory: str, vocab_size: int, *, split: Split | None = None, settings: DataConfig | None = None
) -> TokenDataset:
    """The same, checking only the headers."""
    fs, root = filesystem(directory)
    if is_unfinished(fs, posixpath.dirname(root) if is_pattern(root) else root):
        raise UserError(f"{directory}: its preparation was interrupted: run the same `prepare` again")
    folder, files = find_shards(fs, root, directory, split)
    threads = 1 if is_local(fs) else REQUESTS_AT_A_TIME
    shards = concurrently(lambda file: open_shard(fs, *file), list(files.items()), threads)
    where = url(fs, folder)
    info = dataset_info(where)
    listed = listed_shards(where, info)
    known = tuple(_with_blocks(shard, listed.get(shard.name)) for shard in shards)
    return TokenDataset(where, known, vocab_size, info, listed, settings or DataConfig(), folder == root)


def _with_blocks(shard: Shard, listed: ShardInfo | None) -> Shard:
    """A remote shard with the checksums of its blocks, if they are recorded."""
    if not shard.is_remote or listed is None or listed.crc32 is None or listed.tokens != shard.tokens:
        return shard
    crc32 = decode(listed.crc32, shard.size)
    if crc32 is None:
        raise UserError(
            f"{shard.path}: the checksums of its blocks are damaged: copy dataset.json again, or prepare again"
        )
    return replace(shard, crc32=crc32)


def listed_max_ids(dataset: TokenDataset) -> dict[str, int]:
    """Highest id of each recorded shard, after a check that exactly the shards of the folder are recorded.

    Raises:
        UserError: a shard is missing, not listed, or of another length.
    """
    listed, source = dataset.listed, CHECKSUMS if dataset.info is None else "dataset.json"
    if dataset.info is None and not listed:
        return {}
    found = {shard.name: shard for shard in dataset.shards}
    for name in sorted(listed.keys() - found.keys()) if dataset.is_whole else ():
        raise UserError(
            f"{dataset.directory}/{name}: missing, though {source} lists it: copy it again or prepare again"
        )
    for name, shard in found.items():
        if name not in listed:
            raise UserError(
                f"{shard.path}: not listed in the {source} of its folder: remove it, or remove {source} to use all"
            )
        if shard.tokens != listed[name].tokens:
            raise UserError(
                f"{shard.path}: {shard.tokens:,} tokens where {source} says {listed[name].tokens:,}: prepare again"
            )
    return {name: shard.max_id for name, shard in listed.items()}


def _check_ids(shard: Shard, highest: int, vocab_size: int) -> None:
    """Refuse an id outside the vocabulary; negative ids appear as numbers above 2**31."""
    if highest < vocab_size:
        return
    if highest >= 2**31:
        raise UserError(f"{shard.path}: has numbers below 0 or over 2**31: not token ids, or damaged: write it again")
    if shard.format == "raw":
        raise UserError(
            f"{shard.path}: has no header, and read as {shard.dtype.name} it has token id {highest}, but "
            f"vocab_size={vocab_size}: either it is not a token shard, or it was made with another tokenizer than the model's"
        )
    raise UserError(
        f"{shard.path}: has token id {highest}, but vocab_size={vocab_size}: set vocab_size to at least {highest + 1}, "
        "or prepare it with the model's tokenizer"
    )


def _scan(shard: Shard, budget: int) -> int:
    """Highest id among `budget` tokens of a shard: all of them, or half from each end; 2**31 if one is negative."""
    half = max(budget // 2, 1)
    if shard.tokens <= budget:
        ids = shard.gather(np.array([0]), shard.tokens)
    else:
        ids = shard.gather(np.array([0, shard.tokens - half]), half)
    return 2**31 if int(ids.min(initial=0)) < 0 else int(ids.max(initial=0))


def _sample_checksum(shard: Shard) -> str:
    if shard.format == "parquet":  # its first and last bytes, which hold the checksums and maxima of its columns
        fs, path = filesystem(shard.path)
        ends = (
            read_range(fs, path, 0, min(4096, shard.size)),
            read_range(fs, path, max(0, shard.size - 4096), shard.size),
        )
        return hashlib.sha256(b"".join(ends)).hexdigest()
    length = min(shard.tokens, 4096)
    return hashlib.sha256(shard.gather(np.array([0, shard.tokens - length]), length).tobytes()).hexdigest()
