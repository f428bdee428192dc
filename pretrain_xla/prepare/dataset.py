"""Text → tokens → a dataset that training opens: shards in `train/` and `valid/`, and `dataset.json` beside them.

The bytes of the shards depend on the recipe (source, tokenizer, sizes, seed) and on nothing else: not on the number of
workers, nor on how often the work was broken off and taken up again (`journal`). `dataset.json` is written last: with it
the dataset is whole, without it `open_dataset` refuses to train on the part that is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from pretrain_xla.data.formats import WRITTEN_SUFFIXES
from pretrain_xla.data.manifest import (
    MANIFEST,
    SPLITS,
    UNFINISHED,
    DatasetInfo,
    Recipe,
    SplitInfo,
    dataset_info,
    write_manifest,
)
from pretrain_xla.data.shards import ShardWriter, WrittenFormat, dtype_for, open_shard
from pretrain_xla.errors import Interrupted, UserError
from pretrain_xla.prepare.journal import Journal, clear_journal, read_progress, write_start
from pretrain_xla.prepare.journal import Progress as Left
from pretrain_xla.prepare.progress import ProgressLine
from pretrain_xla.prepare.workers import encode_chunks
from pretrain_xla.redact import redacted
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
from pretrain_xla.text.sources import Source, open_source
from pretrain_xla.text.split import LONG_DOCUMENT, split_document
from pretrain_xla.tokenizers.fingerprint import fingerprint
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer, stored_tokenizer
from pretrain_xla.tokenizers.tokenizer import END_OF_TEXT, SPECIALS_FILE, TOKENIZER_FILES, Tokenizer, is_stored
from pretrain_xla.tokenizers.train import check_vocab_size, train_tokenizer

TOKENIZER_FOLDER = "tokenizer"  # of the dataset's own copy


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
    """Make a dataset of token shards out of text; returns at once where it is there already, whole, by the same recipe.

    An end-of-text id follows each document. Every shard has `shard_size` tokens but the last, which has from a tenth
    of that to a tenth more. Where a document goes, `train` or `valid`, depends on its content alone. When it is broken
    off, by whatever, the shards that are whole stay, and the same call goes on from there; before the first shard
    nothing stays. Memory: about four bytes for each token of a shard, and some hundred MB for each worker. A script
    that calls this needs `if __name__ == "__main__":`, as workers import it.

    Args:
        source: see `open_source`; or documents of your own, as a `Source`.
        output_dir: folder to write to; a local path or an fsspec URL.
        tokenizer: see `load_tokenizer`; none: `gpt2`. Where it is a file, it is copied into the dataset.
        train_vocab_size: instead, first train a byte-level BPE of so many ids on the source's training documents.
        shard_size: tokens of a shard.
        valid_fraction: share of the documents that is held out, over 0 and under 1.
        seed: another one holds out other documents.
        num_workers: processes that tokenise; none: one for each core.
        overwrite: replace a dataset that was made by another recipe; the old one is gone when this begins.
        progress: show a line of progress; without a terminal a new one every minute.
        format: of the shards.

    Raises:
        UserError: bad settings or text, a folder that holds something else or cannot be written, a worker that was
            killed, or nothing in a split.
        Interrupted: Ctrl-C.
    """
    _check(tokenizer, train_vocab_size, shard_size, valid_fraction, seed, num_workers)
    opened = open_source(source) if isinstance(source, str) else source
    fs, root = filesystem(output_dir)
    recipe = Recipe(
        source=redacted(opened.name),
        source_version=opened.version,
        tokenizer=_identity(tokenizer or "gpt2") if train_vocab_size is None else f"bpe of {train_vocab_size} ids",
        shard_size=shard_size,
        valid_fraction=valid_fraction,
        format=format,
        seed=seed,
    )
    with _alone(fs, root):
        return _prepare(
            fs, root, opened, tokenizer, train_vocab_size, recipe, num_workers or _cores(), overwrite, progress
        )


def _prepare(
    fs: Any,
    root: str,
    source: Source,
    tokenizer: str | None,
    train_vocab_size: int | None,
    recipe: Recipe,
    num_workers: int,
    overwrite: bool,
    progress: bool,
) -> DatasetInfo:
    """The same, once nobody else writes there."""
    existing = _existing(fs, root, recipe, overwrite)
    if existing:
        return existing
    _check_own_folder(fs, root, tokenizer)
    left = _left(fs, root, recipe, overwrite)
    choice = load_tokenizer(tokenizer or "gpt2") if train_vocab_size is None else train_vocab_size
    if left is None:
        write_start(fs, root, recipe)
    try:
        if left is None:
            _clear(fs, root)
        chosen = _own_tokenizer(choice, source, recipe, f"{url(fs, root)}/{TOKENIZER_FOLDER}", left is not None)
        return _make(fs, root, source, chosen, recipe, left, num_workers, progress)
    except BaseException as error:
        kept = _keep_or_clear(fs, root)
        if isinstance(error, KeyboardInterrupt):
            again = "go on from the last whole shard" if kept else "start again"
            raise Interrupted(f"interrupted: the same command will {again}", signal.SIGINT) from None
        raise


@contextlib.contextmanager
def _alone(fs: Any, root: str) -> Iterator[None]:
    """Hold a local folder, so that a second preparation there is refused; buckets have no locks.

    The lock is on the folder itself, which leaves no file behind, and the system lets go of it when the process ends.
    """
    if not is_local(fs):
        yield
        return
    made = missing_folders(root)
    if made:
        make_folder(fs, root)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems of networks have no such locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{root}: another process prepares a dataset there: wait until it has ended") from None
        yield
    except BaseException:
        remove_empty(made)
        raise
    finally:
        os.close(descriptor)


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
        raise UserError(f"valid_fraction={valid_fraction}: give a share over 0 and under 1, such as 0.01")
    if seed < 0:
        raise UserError(f"seed={seed}: give 0 or more")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers={num_workers}: give at least 1, or nothing for one a core")


def _check_own_folder(fs: Any, root: str, tokenizer: str | None) -> None:
    """Refuse a tokenizer that lies where the dataset's own copy goes: what prepare writes there, it also removes."""
    if tokenizer is None or tokenizer in known_tokenizers():
        return
    other, path = filesystem(tokenizer)
    given, own = url(other, path), url(fs, f"{root}/{TOKENIZER_FOLDER}")
    if is_local(fs) and is_local(other):
        given, own = os.path.realpath(given), os.path.realpath(own)
    if f"{given}/".startswith(f"{own}/"):
        raise UserError(
            f"tokenizer {tokenizer!r}: lies where the dataset keeps its own copy: move it to another folder"
        )


def _cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(name: str) -> str:
    """What makes a tokenizer this one: its name where that is enough, else its content, wherever the file lies."""
    if name in known_tokenizers():
        return name
    tokenizer = load_tokenizer(name)
    assert is_stored(tokenizer)
    return f"{tokenizer.file_name}:{hashlib.sha256(tokenizer.content).hexdigest()[:16]}"


def _own_tokenizer(choice: Tokenizer | int, source: Source, recipe: Recipe, folder: str, resumed: bool) -> Tokenizer:
    """The tokenizer, trained first where `choice` is a vocabulary size; a copy in the dataset where it is a file."""
    kept = resumed and stored_tokenizer(folder) is not None
    if isinstance(choice, int):
        if kept:
            return load_tokenizer(folder)
        parts = (
            part
            for document in source.documents()
            for part in split_document(document, recipe.valid_fraction, recipe.seed)
        )
        return train_tokenizer((text for split, text in parts if split == "train"), choice, folder)
    if is_stored(choice) and not kept:
        choice.save(folder)
    return choice


def _existing(fs: Any, root: str, recipe: Recipe, overwrite: bool) -> DatasetInfo | None:
    """The dataset that is there, if it is whole and by this recipe; none if the place is free, or may be cleared."""
    where = url(fs, root)
    info = dataset_info(where) if fs.isfile(f"{root}/{MANIFEST}") else None
    if info and info.recipe.same(recipe):
        if not _is_whole(fs, root, info):
            return None
        clear_journal(fs, root)  # there is one only if the very last step was broken off
        return info
    if overwrite:
        return None
    if info:
        changes = _changes(info.recipe, recipe)
        raise UserError(f"{where}: holds a dataset made otherwise ({changes}): choose another folder or --overwrite")
    if not fs.exists(f"{root}/{UNFINISHED}") and (files := [*_shard_files(fs, root), *_tokenizer_files(fs, root)]):
        raise UserError(f"{files[0]}: not written by `prepare`, nor finished: choose another folder or --overwrite")
    return None


def _left(fs: Any, root: str, recipe: Recipe, overwrite: bool) -> Left | None:
    """What an interrupted preparation by this recipe left to go on from."""
    left = None if fs.isfile(f"{root}/{MANIFEST}") else read_progress(fs, root)
    if left is None or not left.splits:
        return None
    if left.recipe.same(recipe):
        return left
    if not overwrite:
        raise UserError(
            f"{url(fs, root)}: holds the shards of an unfinished dataset ({_changes(left.recipe, recipe)}): "
            "give the old command again to finish it, choose another folder, or --overwrite"
        )
    return None


def _changes(old: Recipe, new: Recipe) -> str:
    before, after = old.model_dump(), new.model_dump()
    return ", ".join(f"{key} {before[key]!r} → {after[key]!r}" for key in before if before[key] != after[key])


def _keep_or_clear(fs: Any, root: str) -> bool:
    """After a failure: whether there are shards that the next run can go on from; if not, nothing is left behind."""
    with contextlib.suppress(UserError, OSError):
        left = read_progress(fs, root)
        if left is not None and left.splits:
            return True
        _clear(fs, root)
        clear_journal(fs, root)
        if is_local(fs):  # a bucket has no empty folders
            remove_empty(f"{root}/{folder}" for folder in (*SPLITS, TOKENIZER_FOLDER))
    return False


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
    return [path for path in files if path.removesuffix(PARTIAL).endswith(WRITTEN_SUFFIXES)]


def _tokenizer_files(fs: Any, root: str) -> list[str]:
    paths = (f"{root}/{TOKENIZER_FOLDER}/{file}" for file in (*TOKENIZER_FILES, SPECIALS_FILE))
    return [path for path in paths if fs.exists(path)]


def _clear(fs: Any, root: str) -> None:
    """Remove manifest, shards and tokenizer, and nothing that `prepare` does not write."""
    remove(fs, [f"{root}/{MANIFEST}", *_shard_files(fs, root), *_tokenizer_files(fs, root)])


def _make(
    fs: Any,
    root: str,
    source: Source,
    tokenizer: Tokenizer,
    recipe: Recipe,
    left: Left | None,
    num_workers: int,
    progress: bool,
) -> DatasetInfo:
    """Tokenise what is left to do, and write shards and manifest."""
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(fs, f"{root}/{split}", dtype, recipe.shard_size, recipe.format) for split in SPLITS}
    journal = Journal(fs, root, recipe, writers)
    place, skipped = None, 0
    if left is not None and journal.restore(left):
        place, skipped = left.place, left.skipped
    named = {f"{root}/{split}/{shard.name}" for split in SPLITS for shard in writers[split].written.shards}
    remove(fs, [path for path in _shard_files(fs, root) if path not in named])
    skipped -= source.skipped()  # of an earlier reading, for the tokenizer
    documents = (document._replace(skipped=skipped + source.skipped()) for document in source.read(place))
    chunks = encode_chunks(documents, tokenizer, recipe.valid_fraction, recipe.seed, num_workers)
    with contextlib.closing(chunks), ProgressLine(progress) as counter:
        for chunk in chunks:
            for split, encoded in chunk.splits.items():
                writers[split].append(encoded.tokens, encoded.documents)
                counter.advance(encoded.documents, len(encoded.tokens), chunk.last.share)
            if journal.due():
                journal.enter(chunk.last.place, chunk.last.skipped)
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_splits(fs, root, splits, source, recipe)
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
        root=url(fs, root),
    )
    write_manifest(fs, root, info)
    clear_journal(fs, root)
    return info


def _check_splits(fs: Any, root: str, splits: Mapping[str, SplitInfo], source: Source, recipe: Recipe) -> None:
    total = sum(made.documents for made in splits.values())
    for split, made in splits.items():
        if not made.documents:
            _clear(fs, root)
            clear_journal(fs, root)
            if total == 1:
                raise UserError(
                    f"{source.name}: a single document, of which nothing fell to {split}: one of over {LONG_DOCUMENT:,} "
                    f"characters is cut into pieces, each with a chance of valid_fraction={recipe.valid_fraction}: change "
                    f"that, give more text, or divide it by lines that say {END_OF_TEXT}"
                )
            raise UserError(
                f"{source.name}: valid_fraction={recipe.valid_fraction} leaves nothing for {split} out of {total} "
                f"documents: {'raise' if split == 'valid' else 'lower'} valid_fraction, or add documents"
            )
