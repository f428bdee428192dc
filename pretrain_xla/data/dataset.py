"""A folder of shards, checked when the run starts rather than when the bad one is reached.

What is checked when, and what it costs. Headers against file sizes: always, at start, nothing. Ids against the
vocabulary: by the manifest's maxima, nothing; where there is no manifest (someone else's shards), by reading up to
`SCANNED_TOKENS` at start, some seconds at most, which is everything for small data and both ends of each shard for
large; and again, for every token, when it is read, at about 1% of the time that reading takes. So a wrong tokenizer
is found at once, and nothing out of range ever reaches the device, where it would train on in silence. Checksums:
only on request, `verify_checksums`.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pretrain_xla.data.files import filesystem, url
from pretrain_xla.data.manifest import DatasetInfo, dataset_info, is_unfinished
from pretrain_xla.data.shards import SUFFIX, Shard, open_shard
from pretrain_xla.errors import UserError

SCANNED_TOKENS = 2**28


@dataclass(frozen=True)
class TokenDataset:
    """Shards in the order of their names, all of them readable."""

    directory: str
    shards: tuple[Shard, ...]
    vocab_size: int
    info: DatasetInfo | None
    """The manifest, where there is one."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Of the names, lengths and content of the shards, whatever folder they stand in; for a resume to compare.

        Content is the manifest's checksums; without a manifest, the first and last 4096 tokens of each shard.
        """
        checksums = _checksums(self.info, self.directory)
        lines = [f"{s.name} {s.tokens} {checksums.get(s.name) or _sample_checksum(s)}" for s in self.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def gather(self, shard: int, starts: np.ndarray, length: int) -> np.ndarray:
        """Stretches of tokens out of one shard, as stored: [len(starts), length].

        Raises:
            UserError: a token id that the vocabulary does not have.
        """
        tokens = self.shards[shard].gather(starts, length)
        _check_ids(self.shards[shard].path, int(tokens.max(initial=0)), self.vocab_size)
        return tokens


def open_dataset(directory: str, seq_length: int, vocab_size: int) -> TokenDataset:
    """Open a folder of shards, and check all that can be checked without reading it whole (see the module).

    Args:
        directory: the folder, `.../train` for instance; a local path or an fsspec URL.
        seq_length: tokens of a training sequence; a shard must hold one, and the token after it.
        vocab_size: number of ids that the model has.

    Raises:
        UserError: no folder, no shards, an unfinished dataset, or a shard that is missing, truncated, too short, of
            another type, or from another vocabulary; the message names the file and the mend.
    """
    fs, root = filesystem(directory)
    if not fs.isdir(root):
        raise UserError(f"{directory}: no such folder of token shards: `python -m pretrain_xla prepare` makes one")
    if is_unfinished(fs, root):
        raise UserError(f"{directory}: its preparation was interrupted: run the same `prepare` again")
    files = sorted(path for path in fs.ls(root, detail=False) if path.endswith(SUFFIX))
    if not files:
        inside = [name for name in ("train", "valid") if fs.isdir(f"{root}/{name}")]
        mend = f"; did you mean {directory.rstrip('/')}/{inside[0]}?" if inside else ": prepare a dataset there"
        raise UserError(f"{directory}: no token shards ({SUFFIX}) in it{mend}")
    info = dataset_info(directory)
    shards = tuple(open_shard(fs, path) for path in files)
    for shard in shards:
        if shard.tokens < seq_length + 1:
            raise UserError(
                f"{shard.path}: {shard.tokens:,} tokens are too few for seq_length={seq_length} (it takes "
                f"{seq_length + 1:,}): remove it, lower seq_length, or prepare more text"
            )
    dataset = TokenDataset(url(fs, root), shards, vocab_size, info)
    highest = _listed(dataset)
    for shard in shards:
        if vocab_size <= np.iinfo(shard.dtype).max:
            most = highest[shard.name] if info else _scan(shard, SCANNED_TOKENS // len(shards))
            _check_ids(shard.path, most, vocab_size)
    return dataset


def verify_checksums(directory: str) -> None:
    """Read every shard that a dataset's manifest lists, and compare checksums; about a second for each GB.

    Args:
        directory: a dataset's folder, or one of its splits.

    Raises:
        UserError: no manifest, or a shard that is missing or differs, by name.
    """
    info = dataset_info(directory)
    if info is None:
        raise UserError(f"{directory}: no dataset.json here or above, so there are no checksums to compare with")
    fs, root = filesystem(info.root)
    for split, listed in info.splits.items():
        for shard in listed.shards:
            path, checksum = f"{root}/{split}/{shard.name}", hashlib.sha256()
            if not fs.isfile(path):
                raise UserError(f"{url(fs, path)}: missing, though dataset.json lists it: prepare the dataset again")
            with fs.open(path, "rb") as file:
                while block := file.read(2**22):
                    checksum.update(block)
            if checksum.hexdigest() != shard.sha256:
                raise UserError(f"{url(fs, path)}: differs from its checksum: copy it again or prepare again")


def _listed(dataset: TokenDataset) -> dict[str, int]:
    """Highest id of each shard by the manifest, after checking that the folder has just the shards that it lists."""
    if dataset.info is None:
        return {}
    split = dataset.info.splits.get(posixpath.basename(dataset.directory))
    listed = {shard.name: shard for shard in split.shards} if split else {}
    found = {shard.name: shard for shard in dataset.shards}
    for name in sorted(listed.keys() - found.keys()):
        raise UserError(f"{dataset.directory}/{name}: missing, though dataset.json lists it: prepare the dataset again")
    for name, shard in found.items():
        if name not in listed:
            raise UserError(
                f"{shard.path}: not listed in the dataset.json beside it: remove it, or remove dataset.json to use all"
            )
        if shard.tokens != listed[name].tokens:
            raise UserError(
                f"{shard.path}: {shard.tokens:,} tokens where dataset.json says {listed[name].tokens:,}: prepare again"
            )
    return {name: shard.max_id for name, shard in listed.items()}


def _check_ids(path: str, highest: int, vocab_size: int) -> None:
    if highest >= vocab_size:
        raise UserError(
            f"{path}: has token id {highest}, but vocab_size={vocab_size}: set vocab_size to at least {highest + 1}, "
            "or prepare it with the model's tokenizer"
        )


def _scan(shard: Shard, budget: int) -> int:
    """Highest id among `budget` tokens of a shard: all of them, or half from each end."""
    if shard.tokens <= budget:
        return int(shard.gather(np.array([0]), shard.tokens).max(initial=0))
    half = max(budget // 2, 1)
    return int(shard.gather(np.array([0, shard.tokens - half]), half).max(initial=0))


def _sample_checksum(shard: Shard) -> str:
    length = min(shard.tokens, 4096)
    return hashlib.sha256(shard.gather(np.array([0, shard.tokens - length]), length).tobytes()).hexdigest()


def _checksums(info: DatasetInfo | None, directory: str) -> dict[str, str]:
    split = info.splits.get(posixpath.basename(directory)) if info else None
    return {shard.name: shard.sha256 for shard in split.shards} if split else {}
