"""Makes a dataset that training opens: text → tokens → shards in `train/` and `valid/`, and `dataset.json` beside them.

The bytes of the shards depend only on the recipe (source, tokenizer, sizes, seed), not on the number of workers, nor on how
often the work was interrupted and resumed (see `journal.py`). `dataset.json` is written last: a folder without it is not a
complete dataset, and `open_dataset` refuses to train on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Mapping

from pretrain_xla.data.manifest import SPLITS, DatasetInfo, Recipe, SplitInfo, write_manifest
from pretrain_xla.data.shards import ShardWriter, WrittenFormat, dtype_for
from pretrain_xla.errors import Interrupted, UserError
from pretrain_xla.prepare.journal import Journal, Progress, clear_journal, write_start
from pretrain_xla.prepare.output_folder import TOKENIZER_FOLDER, OutputFolder
from pretrain_xla.prepare.progress import ProgressLine
from pretrain_xla.prepare.workers import encode_chunks
from pretrain_xla.redact import redacted
from pretrain_xla.storage.files import filesystem, remove
from pretrain_xla.text.source import Source
from pretrain_xla.text.sources import open_source
from pretrain_xla.text.split import LONG_DOCUMENT, split_document
from pretrain_xla.tokenizers.checksums import recording_checksums
from pretrain_xla.tokenizers.fingerprint import fingerprint
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer, stored_tokenizer
from pretrain_xla.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, is_stored
from pretrain_xla.tokenizers.train import check_vocab_size, train_tokenizer


def prepare(
    source: str | Source,
    output_dir: str,
    tokenizer: str | None = None,
    *,
    train_vocab_size: int | None = None,
    shard_size: int = 100_000_000,
    valid_fraction: float = 0.05,
    seed: int = 0,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    format: WrittenFormat = "npy",
) -> DatasetInfo:
    """Make a dataset of token shards from text. Returns at once if a complete one by the same recipe is there.

    Each document is followed by an end-of-text id. Every shard has `shard_size` tokens, except the last, which has from a
    tenth of that to a tenth more. Whether a document goes to `train` or `valid` depends only on its content. If this is
    interrupted, complete shards stay and the same call resumes after them; before the first shard is complete, nothing
    stays. Memory: about four bytes for each token of a shard, and some hundred MB for each worker. A script that calls
    this needs `if __name__ == "__main__":`, because workers import it.

    Args:
        source: see `open_source`; or documents of your own, as a `Source`.
        output_dir: folder to write to; a local path or an fsspec URL.
        tokenizer: see `load_tokenizer`; None means `gpt2`. A tokenizer that is a file is copied into the dataset.
        train_vocab_size: instead, first train a byte-level BPE with this many ids on the source's training documents.
        shard_size: tokens in a shard.
        valid_fraction: share of the documents that is held out, above 0 and below 1.
        seed: another one holds out other documents.
        num_workers: processes that tokenize; None means one for each core.
        overwrite: replace a dataset made by another recipe, which is deleted before this one is made.
        progress: show progress; without a terminal, as a new line every minute.
        format: of the shards.

    Raises:
        UserError: bad settings or text, a folder that holds something else or cannot be written, a worker that was
            killed, or an empty split.
        Interrupted: Ctrl-C.
    """
    _check(tokenizer, train_vocab_size, shard_size, valid_fraction, seed, num_workers)
    opened = open_source(source) if isinstance(source, str) else source
    folder = OutputFolder(*filesystem(output_dir))
    recipe = Recipe(
        source=redacted(opened.name),
        source_version=opened.version,
        tokenizer=_identity(tokenizer or "gpt2") if train_vocab_size is None else f"bpe of {train_vocab_size} ids",
        shard_size=shard_size,
        valid_fraction=valid_fraction,
        format=format,
        seed=seed,
    )
    with folder.locked():
        finished = folder.finished(recipe, overwrite)
        if finished:
            return finished
        folder.refuse_tokenizer_inside(tokenizer)
        unfinished = folder.unfinished(recipe, overwrite)
        choice = load_tokenizer(tokenizer or "gpt2") if train_vocab_size is None else train_vocab_size
        if unfinished is None:
            write_start(folder.fs, folder.root, recipe)
        try:
            if unfinished is None:
                folder.clear()
            chosen = _own_tokenizer(choice, opened, recipe, folder.tokenizer, unfinished is not None)
            return _make(folder, opened, chosen, recipe, unfinished, num_workers or _cores(), progress)
        except BaseException as error:
            resumable = folder.clear_unless_resumable()
            if isinstance(error, KeyboardInterrupt):
                again = "resume after the last complete shard" if resumable else "start again"
                raise Interrupted(f"interrupted: the same command will {again}", signal.SIGINT) from None
            raise


def _check(
    tokenizer: str | None,
    train_vocab_size: int | None,
    shard_size: int,
    valid_fraction: float,
    seed: int,
    num_workers: int | None,
) -> None:
    if tokenizer is not None and train_vocab_size is not None:
        raise UserError(f"tokenizer={tokenizer} and train_vocab_size={train_vocab_size}: give one of them")
    if train_vocab_size is not None:
        check_vocab_size(train_vocab_size)
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size}: a shard needs at least one token")
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction}: give a share above 0 and below 1, such as 0.01")
    if seed < 0:
        raise UserError(f"seed={seed}: give 0 or more")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers={num_workers}: give at least 1, or leave it out for one per core")


def _cores() -> int:
    """Cores that this process may use; in a container they can be fewer than the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(name: str) -> str:
    """What identifies a tokenizer in a recipe: a built-in name, or else a checksum of the file's content, not its path."""
    if name in known_tokenizers():
        return name
    tokenizer = load_tokenizer(name)
    assert is_stored(tokenizer)
    return f"{tokenizer.file_name}:{hashlib.sha256(tokenizer.content).hexdigest()[:16]}"


def _own_tokenizer(choice: Tokenizer | int, source: Source, recipe: Recipe, folder: str, resumed: bool) -> Tokenizer:
    """The tokenizer, trained first where `choice` is a vocabulary size; a tokenizer that is a file is copied to `folder`."""
    kept = resumed and stored_tokenizer(folder) is not None
    if isinstance(choice, int):
        if kept:
            return load_tokenizer(folder)
        parts = (
            part
            for document in source.documents()
            for part in split_document(document, recipe.valid_fraction, recipe.seed)
        )
        with recording_checksums(folder):
            return train_tokenizer((text for split, text in parts if split == "train"), choice, folder)
    if is_stored(choice) and not kept:
        with recording_checksums(folder):
            choice.save(folder)
    return choice


def _make(
    folder: OutputFolder,
    source: Source,
    tokenizer: Tokenizer,
    recipe: Recipe,
    unfinished: Progress | None,
    num_workers: int,
    show_progress: bool,
) -> DatasetInfo:
    """Tokenize what is left to do, and write shards and manifest."""
    fs, root = folder.fs, folder.root
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(fs, f"{root}/{split}", dtype, recipe.shard_size, recipe.format) for split in SPLITS}
    journal = Journal(fs, root, recipe, writers)
    place, skipped = None, 0
    if unfinished is not None and journal.restore(unfinished):
        place, skipped = unfinished.place, unfinished.skipped
    listed = {f"{root}/{split}/{shard.name}" for split in SPLITS for shard in writers[split].written.shards}
    remove(fs, [path for path in folder.shards() if path not in listed])
    skipped -= source.skipped()  # counted when the tokenizer was trained
    documents = (document._replace(skipped=skipped + source.skipped()) for document in source.read(place))
    chunks = encode_chunks(documents, tokenizer, recipe.valid_fraction, recipe.seed, num_workers)
    with contextlib.closing(chunks), ProgressLine(show_progress) as line:
        for chunk in chunks:
            for split, encoded in chunk.splits.items():
                writers[split].append(encoded.tokens, encoded.documents)
                line.advance(encoded.documents, len(encoded.tokens), chunk.last.share)
            if journal.due():
                journal.enter(chunk.last.place, chunk.last.skipped)
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_splits(folder, splits, source, recipe)
    own = f"{TOKENIZER_FOLDER}/{tokenizer.file_name}" if is_stored(tokenizer) else None
    info = DatasetInfo(
        tokenizer=own or tokenizer.name,
        tokenizer_fingerprint=fingerprint(tokenizer),
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        splits=splits,
        skipped_documents=skipped + source.skipped(),
        recipe=recipe,
        root=folder.url,
    )
    write_manifest(fs, root, info)
    clear_journal(fs, root)
    return info


def _check_splits(folder: OutputFolder, splits: Mapping[str, SplitInfo], source: Source, recipe: Recipe) -> None:
    """Refuse a dataset with an empty split, and remove it."""
    total = sum(made.documents for made in splits.values())
    for split, made in splits.items():
        if made.documents:
            continue
        folder.clear()
        clear_journal(folder.fs, folder.root)
        if total == 1:
            raise UserError(
                f"{source.name}: a single document, and {split} got nothing of it: a document of over {LONG_DOCUMENT:,} "
                f"characters is cut into sections, and valid_fraction={recipe.valid_fraction} is the chance of each to be "
                f"held out: change that, give more text, or separate documents by lines that say {END_OF_TEXT}"
            )
        raise UserError(
            f"{source.name}: valid_fraction={recipe.valid_fraction} leaves nothing for {split} out of {total} "
            f"documents: {'raise' if split == 'valid' else 'lower'} valid_fraction, or add documents"
        )
