"""Text → tokens → a dataset that training opens: shards in `train/` and `valid/`, and `dataset.json` beside them.

The bytes of the shards depend on the recipe (source, tokenizer, sizes) and on nothing else. `dataset.json` is written
last: with it the dataset is whole, without it `open_dataset` refuses to train on the part that is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pretrain_xla.data.files import PARTIAL, filesystem, remove, url, write_atomically
from pretrain_xla.data.formats import is_shard
from pretrain_xla.data.manifest import (
    MANIFEST,
    SPLITS,
    UNFINISHED,
    DatasetInfo,
    Recipe,
    dataset_info,
    write_manifest,
)
from pretrain_xla.data.shards import ShardWriter, WrittenFormat, dtype_for, open_shard
from pretrain_xla.data.sources import Source, open_source
from pretrain_xla.data.split import split_document
from pretrain_xla.data.tokenizer import TOKENIZER_FILE, JsonTokenizer, Tokenizer, known_tokenizers, load_tokenizer
from pretrain_xla.data.train_tokenizer import check_vocab_size, train_tokenizer
from pretrain_xla.errors import UserError

TOKENIZER_FOLDER = "tokenizer"  # of the dataset's own copy
_BATCH_CHARACTERS, _BATCH_TEXTS = 2**22, 4096


def prepare(
    source: str | Source,
    output_dir: str,
    tokenizer: str | None = None,
    *,
    train_vocab_size: int | None = None,
    shard_size: int = 100_000_000,
    valid_fraction: float = 0.05,
    overwrite: bool = False,
    progress: bool = True,
    format: WrittenFormat = "npy",
) -> DatasetInfo:
    """Make a dataset of token shards out of text; returns at once where it is there already, whole, by the same recipe.

    An end-of-text id follows each document. Every shard has `shard_size` tokens but the last, which has from a tenth
    of that to a tenth more. Where a document goes, `train` or `valid`, depends on its content alone. When anything
    fails, what was written is removed. Memory: about four bytes for each token of a shard.

    Args:
        source: see `open_source`; or documents of your own, as a `Source`.
        output_dir: folder to write to; a local path or an fsspec URL.
        tokenizer: see `load_tokenizer`; none: `gpt2`. A `tokenizer.json` is copied into the dataset.
        train_vocab_size: instead, first train a byte-level BPE of so many ids on the source's training documents.
        shard_size: tokens of a shard.
        valid_fraction: share of the documents that is held out, over 0 and under 1.
        overwrite: replace a dataset that was made by another recipe; the old one is gone when this begins.
        progress: show a line of progress, on a terminal.
        format: of the shards.

    Raises:
        UserError: bad settings or text, a folder that holds something else or cannot be written, or nothing in a split.
    """
    _check(tokenizer, train_vocab_size, shard_size, valid_fraction)
    opened = open_source(source) if isinstance(source, str) else source
    fs, root = filesystem(output_dir)
    recipe = Recipe(
        source=opened.name,
        source_version=opened.version,
        tokenizer=_identity(tokenizer or "gpt2") if train_vocab_size is None else f"bpe of {train_vocab_size} ids",
        shard_size=shard_size,
        valid_fraction=valid_fraction,
        format=format,
    )
    existing = _existing(fs, root, recipe, overwrite)
    if existing:
        return existing
    choice = load_tokenizer(tokenizer or "gpt2") if train_vocab_size is None else train_vocab_size
    write_atomically(fs, f"{root}/{UNFINISHED}", [recipe.model_dump_json(indent=2).encode()])
    try:
        _clear(fs, root)
        chosen = _own_tokenizer(choice, opened, valid_fraction, f"{url(fs, root)}/{TOKENIZER_FOLDER}")
        info = _make(fs, root, opened, chosen, recipe, progress)
        write_manifest(fs, root, info)
    except BaseException:
        with contextlib.suppress(UserError, OSError):
            _clear(fs, root)
            remove(fs, [f"{root}/{UNFINISHED}"])
        raise
    remove(fs, [f"{root}/{UNFINISHED}"])
    return info


def _check(tokenizer: str | None, train_vocab_size: int | None, shard_size: int, valid_fraction: float) -> None:
    if tokenizer is not None and train_vocab_size is not None:
        raise UserError(f"tokenizer={tokenizer} and train_vocab_size={train_vocab_size}: give one of them")
    if train_vocab_size is not None:
        check_vocab_size(train_vocab_size)
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size}: a shard needs at least one token")
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction}: give a share over 0 and under 1, such as 0.01")


def _identity(name: str) -> str:
    """What makes a tokenizer this one: its name where that is enough, else its content, wherever the file lies."""
    if name in known_tokenizers():
        return name
    tokenizer = load_tokenizer(name)
    assert isinstance(tokenizer, JsonTokenizer)
    content = f"{tokenizer.tokenizer.to_str()}{tokenizer.end_of_text}"
    return f"{TOKENIZER_FILE}:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _own_tokenizer(choice: Tokenizer | int, source: Source, valid_fraction: float, folder: str) -> Tokenizer:
    """The tokenizer, trained first where `choice` is a vocabulary size; a copy in the dataset where it is a file."""
    if isinstance(choice, int):
        parts = (part for document in source.documents() for part in split_document(document, valid_fraction))
        return train_tokenizer((text for split, text in parts if split == "train"), choice, folder)
    if isinstance(choice, JsonTokenizer):
        choice.save(folder)
    return choice


def _existing(fs: Any, root: str, recipe: Recipe, overwrite: bool) -> DatasetInfo | None:
    """The dataset that is there, if it is whole and by this recipe; none if the place is free, or may be cleared."""
    where = url(fs, root)
    info = dataset_info(where) if fs.isfile(f"{root}/{MANIFEST}") else None
    if info and info.recipe.same(recipe):
        return info if _is_whole(fs, root, info) else None
    if overwrite:
        return None
    if info:
        old, new = info.recipe.model_dump(), recipe.model_dump()
        changes = ", ".join(f"{key} {old[key]!r} → {new[key]!r}" for key in old if old[key] != new[key])
        raise UserError(f"{where}: holds a dataset made otherwise ({changes}): choose another folder or --overwrite")
    if not fs.exists(f"{root}/{UNFINISHED}") and (files := _shard_files(fs, root)):
        raise UserError(f"{files[0]}: not written by `prepare`, nor finished: choose another folder or --overwrite")
    return None


def _is_whole(fs: Any, root: str, info: DatasetInfo) -> bool:
    """Whether every shard is there with as many tokens as the manifest says."""
    try:
        return all(
            open_shard(fs, f"{root}/{split}/{shard.name}").tokens == shard.tokens
            for split, listed in info.splits.items()
            for shard in listed.shards
        )
    except UserError:
        return False


def _shard_files(fs: Any, root: str) -> list[str]:
    folders = [f"{root}/{split}" for split in SPLITS if fs.isdir(f"{root}/{split}")]
    files = [path for folder in folders for path in fs.ls(folder, detail=False)]
    return [path for path in files if is_shard(path.removesuffix(PARTIAL))]


def _clear(fs: Any, root: str) -> None:
    """Remove manifest and shards, and nothing that `prepare` does not write."""
    remove(fs, [f"{root}/{MANIFEST}", *_shard_files(fs, root)])


def _make(fs: Any, root: str, source: Source, tokenizer: Tokenizer, recipe: Recipe, progress: bool) -> DatasetInfo:
    """Tokenise everything and write the shards; the manifest is left to the caller."""
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(fs, f"{root}/{split}", dtype, recipe.shard_size, recipe.format) for split in SPLITS}
    texts = (part for document in source.documents() for part in split_document(document, recipe.valid_fraction))
    with _Counter(progress) as counter:
        for batch in _batched(texts):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for split, writer in writers.items():
                ids = [
                    [*ids, tokenizer.end_of_text] for (to, _), ids in zip(batch, encoded, strict=True) if to == split
                ]
                writer.append(np.fromiter(itertools.chain.from_iterable(ids), dtype), documents=len(ids))
                counter.advance(len(ids), sum(map(len, ids)))
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, made in splits.items():
        if not made.documents:
            total = sum(other.documents for other in splits.values())
            raise UserError(
                f"{source.name}: valid_fraction={recipe.valid_fraction} leaves nothing for {split} out of {total} "
                f"documents: {'raise' if split == 'valid' else 'lower'} valid_fraction, or add documents"
            )
    own = isinstance(tokenizer, JsonTokenizer)
    return DatasetInfo(
        tokenizer=f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}" if own else tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        splits=splits,
        recipe=recipe,
        root=url(fs, root),
    )


def _batched(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Enough texts at a time to keep all cores busy, few enough to hold."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for split, text in texts:
        batch.append((split, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Counter:
    """A line of progress on the terminal's standard error; silent elsewhere."""

    def __init__(self, show: bool) -> None:
        console = Console(stderr=True)
        self._documents = self._tokens = 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
        self._task = self._progress.add_task("tokenising", total=None)

    def advance(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        seconds = self._progress.tasks[0].elapsed or 1e-9
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / seconds / 1e6:.1f}M tokens/s"
        self._progress.update(self._task, description=text)

    def __enter__(self) -> _Counter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
