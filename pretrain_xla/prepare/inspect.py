"""Inspects a folder of shards: token counts, id frequencies, document lengths, and faults.

Shards of any format and at any URL are read from first to last, in blocks of bounded size. A document ends with the end-of-text
id (as `prepare` writes) or begins with it (as build-nanogpt does); the very first id shows which. Faults are collected, not
raised, so that all of them are shown at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain_xla.config import DataConfig
from pretrain_xla.data.checksums import verify_checksums, write_checksums
from pretrain_xla.data.dataset import TokenDataset, listed_max_ids, open_shards
from pretrain_xla.data.index_files import META, Meta, read_meta
from pretrain_xla.data.shards import read_sibling
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer

_BLOCK = 2**22  # tokens read at a time
_MAX_SHOWN = 400  # tokens of a document that are decoded
_MAX_COUNTED_ID = 2**24  # no vocabulary is larger; higher ids are not counted one by one


@dataclass
class Inspection:
    """The result; lengths and counts in tokens."""

    path: str
    shards: list[dict[str, Any]]
    tokens: int = 0
    max_id: int = 0
    tokenizer: str | None = None
    vocab_size: int | None = None
    end_of_text: int | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[ids] occurrences of each id."""
    document_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[documents] without end-of-text; a document that is divided between two shards counts as one."""
    documents: list[str] = field(default_factory=list)
    """The first documents, decoded and truncated."""
    faults: list[str] = field(default_factory=list)
    recorded: str | None = None
    """The file that checksums were written to."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain numbers, and percentiles instead of arrays."""
        lengths = self.document_lengths
        quantiles = (0, 10, 25, 50, 75, 90, 99, 100)
        values = np.percentile(lengths, quantiles) if len(lengths) else []
        top = np.argsort(-self.counts, kind="stable")[:20]
        return {
            "path": self.path,
            "shards": self.shards,
            "tokens": self.tokens,
            "documents": len(lengths),
            "max_id": self.max_id,
            "distinct_ids": int((self.counts > 0).sum()),
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "document_length_percentiles": {str(q): float(v) for q, v in zip(quantiles, values, strict=True)}
            if len(lengths)
            else {},
            "most_frequent_ids": [[int(token), int(self.counts[token])] for token in top if self.counts[token]],
            "first_documents": self.documents,
            "faults": self.faults,
            "recorded": self.recorded,
        }


def inspect(
    path: str,
    tokenizer: str | None = None,
    *,
    documents: int = 3,
    verify: bool = False,
    record: bool = False,
    settings: DataConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Read shards from first to last.

    Args:
        path: folder, file or pattern; local, or a URL.
        tokenizer: to decode with, and to check ids against; None means the manifest's, or, without a manifest and if all ids
            are GPT-2's, gpt2.
        documents: how many documents to decode, from the first one.
        verify: also compare all recorded checksums, including those of the manifest's other splits.
        record: record checksums if all shards can be read (see `write_checksums`).
        settings: where and how to cache remote shards.
        progress: called with tokens read and tokens in total.

    Raises:
        UserError: there are no shards, they cannot be opened, or the checksums cannot be written.
    """
    dataset = open_shards(path, 2**32, settings=settings)
    if record and not dataset.is_whole:
        raise UserError(f"{path}: checksums are recorded for all shards of a folder: name {dataset.directory}")
    keys = ("name", "format", "tokens")
    shards = [{key: getattr(shard, key) for key in keys} | {"dtype": shard.dtype.name} for shard in dataset.shards]
    result = Inspection(path, shards, tokens=dataset.tokens)
    try:
        listed_max_ids(dataset)
    except UserError as error:
        result.faults.append(str(error))
    first = _read(dataset, result, progress)
    if record and not result.faults:
        result.recorded = write_checksums(dataset.directory, dataset.shards, _max_ids(result))
    meta = _meta(dataset, result) if tokenizer is None and dataset.info is None else None
    chosen = None if meta else _tokenizer(dataset, result, tokenizer)
    if meta is not None:
        _measure_characters(dataset, result, meta)
    elif chosen is not None:
        result.tokenizer, result.vocab_size, result.end_of_text = chosen.name, chosen.vocab_size, chosen.end_of_text
        _measure(dataset, result, chosen, first, documents)
    if verify:
        try:
            verify_checksums(dataset.directory)
        except UserError as error:
            result.faults.append(str(error))
    return result


def _max_ids(result: Inspection) -> dict[str, int]:
    return {str(shard["name"]): int(shard.get("max_id", 0)) for shard in result.shards}


def blocks(dataset: TokenDataset, faults: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """(shard index, tokens) from first to last; a read error becomes a fault and ends its shard."""
    for number, shard in enumerate(dataset.shards):
        dataset.loader.plan([number], [number + 1] if number + 1 < len(dataset.shards) else [])
        for start in range(0, shard.tokens, _BLOCK):
            try:
                length = min(_BLOCK, shard.tokens - start)
                ids = dataset.gather(number, np.array([start]), length)[0].view(np.uint32)
            except UserError as error:
                faults.append(str(error))
                break
            yield number, ids


def _read(dataset: TokenDataset, result: Inspection, progress: Callable[[int, int], None]) -> int | None:
    """Count ids; returns the very first id."""
    counts, done, first = np.zeros(2**16, np.int64), 0, None
    for number, ids in blocks(dataset, result.faults):
        first = int(ids[0]) if first is None else first
        highest = int(ids.max())
        result.max_id = max(result.max_id, highest)
        result.shards[number]["max_id"] = max(result.shards[number].get("max_id", 0), highest)
        found = np.bincount(ids[ids < _MAX_COUNTED_ID])
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        done += len(ids)
        progress(done, dataset.tokens)
    result.counts = counts[: min(result.max_id + 1, len(counts))]
    return first


def _tokenizer(dataset: TokenDataset, result: Inspection, asked: str | None) -> Tokenizer | None:
    name = asked or (dataset.info.tokenizer_name if dataset.info else None)
    if name is not None:
        return load_tokenizer(name)
    if result.max_id > 50256:
        result.faults.append(
            f"no manifest, and id {result.max_id} is not GPT-2's: give --tokenizer to decode and to check"
        )
        return None
    try:
        return load_tokenizer("gpt2")
    except UserError as error:
        result.faults.append(f"cannot decode: {error}")
        return None


def _meta(dataset: TokenDataset, result: Inspection) -> Meta | None:
    """The character vocabulary that nanoGPT writes next to its shards."""
    fs, folder = filesystem(dataset.directory)
    raw = read_sibling(fs, folder, META)
    try:
        return read_meta(raw, f"{dataset.directory}/{META}") if raw is not None else None
    except UserError as error:
        result.faults.append(str(error))
        return None


def _measure_characters(dataset: TokenDataset, result: Inspection, meta: Meta) -> None:
    """Decode the beginning; a text of characters has no end-of-text, and so no documents."""
    result.tokenizer, result.vocab_size = META, meta.vocab_size
    for shard in result.shards:
        if shard.get("max_id", 0) >= meta.vocab_size:
            result.faults.append(f"{shard['name']}: has id {shard['max_id']}, but {META} has {meta.vocab_size}")
    if not result.faults and dataset.shards[0].tokens:
        count = min(_MAX_SHOWN, dataset.shards[0].tokens)
        result.documents.append(meta.decode(dataset.gather(0, np.array([0]), count)[0].tolist()) + " ...")


def _measure(
    dataset: TokenDataset, result: Inspection, tokenizer: Tokenizer, first: int | None, documents: int
) -> None:
    """Document lengths, the first documents decoded, and ids that the tokenizer does not have."""
    for shard in result.shards:
        if shard.get("max_id", 0) >= tokenizer.vocab_size:
            result.faults.append(
                f"{shard['name']}: has id {shard['max_id']}, but {tokenizer.name} has {tokenizer.vocab_size}"
            )
    end = tokenizer.end_of_text
    if result.tokens and (end >= len(result.counts) or not result.counts[end]):
        result.faults.append(
            f"no end-of-text ({end}) in it: documents are not separated, or this is not their tokenizer"
        )
    result.document_lengths = _lengths(dataset, end, opens=first == end)
    for start, length in _first_spans(result.document_lengths[:documents], opens=first == end):
        if start + min(length, _MAX_SHOWN) <= dataset.shards[0].tokens and not result.faults:
            ids = dataset.gather(0, np.array([start]), min(length, _MAX_SHOWN))[0].tolist()
            result.documents.append(tokenizer.decode(ids) + (" ..." if length > _MAX_SHOWN else ""))


def _lengths(dataset: TokenDataset, end: int, opens: bool) -> np.ndarray:
    """Tokens before each end-of-text id, or after it where it opens documents."""
    borders, before = [np.array([-1])], 0
    for _, ids in blocks(dataset, []):
        borders.append(np.flatnonzero(ids == end) + before)
        before += len(ids)
    if borders[-1].size == 0 or borders[-1][-1] != before - 1 or opens:
        borders.append(np.array([before]))
    lengths = np.diff(np.concatenate(borders)) - 1
    return lengths[1:] if opens else lengths


def _first_spans(lengths: np.ndarray, opens: bool) -> list[tuple[int, int]]:
    starts = np.cumsum(np.concatenate([[0], lengths + 1]))[: len(lengths)] + opens
    return [(int(start), int(length)) for start, length in zip(starts, lengths, strict=True)]
