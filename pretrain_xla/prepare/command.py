"""Command-line interface of `prepare`, `prepare_fineweb.py` and `train-tokenizer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from pretrain_xla.command_line import parse
from pretrain_xla.data.manifest import DatasetInfo
from pretrain_xla.data.shards import WrittenFormat
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.redact import redacted
from pretrain_xla.text.source import Source
from pretrain_xla.text.sources import join_sources, open_source
from pretrain_xla.tokenizers.train import Kind, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """How sources are read."""

    weights: str | None = None
    """Share of the characters that comes from each source, such as 7:3, until one source ends; None means all of each."""
    text_column: str = "text"
    """Key or column with the text, in JSON, CSV, Parquet, Arrow and datasets; a.b for b within a."""
    document_per_line: bool = False
    """In text files, each line is a document."""
    skip_bad_documents: bool = False
    """In files, skip and count unreadable documents (not JSON, no text under the key, not UTF-8) instead of stopping."""
    streaming: bool = False
    """Stream hf: datasets over the network instead of downloading them first."""
    cache_dir: str | None = None
    """Folder for downloaded hf: datasets; None means the default of `datasets`."""
    max_documents: int | None = None
    """Stop after this many documents. None means all."""

    def open(self, names: Sequence[str]) -> Source:
        """Open all sources as one."""
        opened = [
            open_source(
                name,
                text_column=self.text_column,
                streaming=self.streaming,
                cache_dir=self.cache_dir,
                document_per_line=self.document_per_line,
                skip_bad_documents=self.skip_bad_documents,
            )
            for name in names
        ]
        try:
            weights = [float(weight) for weight in self.weights.split(":")] if self.weights else []
        except ValueError:
            raise UserError(f"--weights {self.weights}: give a number for each source, such as 7:3") from None
        return join_sources(opened, weights, self.max_documents)


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(ReadingFlags):
    """Turn text into token shards, in train/ and valid/, and write dataset.json. Resumes if interrupted."""

    paths: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...] OUTPUT-DIR")
    ] = ()
    """Text, JSON, CSV, Parquet or Arrow, compressed or in a .tar or .zip: a file, a folder, a pattern with *, or a URL;
    hf:DATASET[:CONFIG[:SPLIT]] for a dataset on the Hugging Face Hub; or `quickstart`, Python's built-in documentation.
    The last argument is the folder to write to."""
    tokenizer: str | None = None
    """tiktoken name, tokenizer.json, SentencePiece .model, bitbpe.json, a folder with one, or `bytes`; None means gpt2."""
    train_vocab_size: int | None = None
    """Instead of --tokenizer: first train a BPE with this many ids on the text. None means no training."""
    shard_size: int = 100_000_000
    """Tokens in a shard."""
    valid_fraction: float | None = None
    """Share of the documents held out for validation; None means 0.05, or 0.01 for a dataset on the Hub (of ten billion tokens,
    that is more than any validation reads)."""
    format: WrittenFormat = "npy"
    """Format of the shards: .npy, .bin (as in llm.c), or Parquet with a column input_ids."""
    seed: int = 0
    """A different seed holds out different documents."""
    num_workers: int | None = None
    """Processes that tokenize; None means one per core. The shards do not depend on it."""
    overwrite: bool = False
    """Replace a dataset that was made with other settings."""


def prepare_command(arguments: Sequence[str]) -> None:
    """Parse the flags, prepare, and print a summary.

    Raises:
        UserError: see `prepare`.
    """
    flags = parse(PrepareFlags, arguments, program="python -m pretrain_xla prepare", command="prepare")
    *sources, output_dir = flags.paths or [""]
    if not sources:
        raise UserError("prepare: give at least one source, and then the folder to write to")
    info = prepare(
        flags.open(sources),
        output_dir,
        flags.tokenizer,
        train_vocab_size=flags.train_vocab_size,
        shard_size=flags.shard_size,
        valid_fraction=flags.valid_fraction if flags.valid_fraction is not None else default_fraction(sources),
        seed=flags.seed,
        num_workers=flags.num_workers,
        overwrite=flags.overwrite,
        format=flags.format,
    )
    show_dataset(info)


def default_fraction(sources: Sequence[str]) -> float:
    """Default share of the documents to hold out: less of a dataset on the Hub, as these are large."""
    return 0.01 if any(source.startswith("hf:") for source in sources) else 0.05


@dataclass(frozen=True)
class FinewebFlags:
    """Download FineWeb's sample of ten billion tokens, and write it as token shards to train/ and valid/."""

    seed: int = 0
    """A different seed holds out different documents."""
    fineweb_edu: bool = False
    """FineWeb-Edu instead of FineWeb."""
    streaming: bool = False
    """Stream over the network instead of downloading first."""
    tokenizer: str = "gpt2"
    """tiktoken name, tokenizer.json, SentencePiece .model, bitbpe.json, a folder with one, or `bytes`."""
    shard_size: int = 100_000_000
    """Tokens in a shard."""
    output_dir: str | None = None
    """Folder to write to; None means fineweb_edu, where training looks by default, or fineweb."""
    num_workers: int = 1
    """Processes that tokenize. The shards do not depend on it."""
    cache_dir: str | None = None
    """Folder for downloads; None means the default of `datasets`."""
    overwrite: bool = False
    """Replace a dataset that was made with other settings."""


def prepare_fineweb_command(arguments: Sequence[str]) -> None:
    """Parse the flags, prepare, and print a summary; 1% of the documents is held out.

    Raises:
        UserError: see `prepare`.
    """
    flags = parse(FinewebFlags, arguments, program="prepare_fineweb.py", command="prepare")
    dataset = "HuggingFaceFW/fineweb-edu" if flags.fineweb_edu else "HuggingFaceFW/fineweb"
    output_dir = flags.output_dir or ("fineweb_edu" if flags.fineweb_edu else "fineweb")
    info = prepare(
        open_source(f"hf:{dataset}:sample-10BT", streaming=flags.streaming, cache_dir=flags.cache_dir),
        output_dir,
        flags.tokenizer,
        shard_size=flags.shard_size,
        valid_fraction=default_fraction(["hf:"]),
        seed=flags.seed,
        num_workers=flags.num_workers,
        overwrite=flags.overwrite,
    )
    show_dataset(info)


def show_dataset(info: DatasetInfo) -> None:
    """Print a table of a dataset, and the flags to train on it."""
    root = os.path.relpath(info.root) if "://" not in info.root else info.root
    root = redacted(root)
    print(f"{root}: {info.vocab_size:,} token ids by {info.tokenizer}, stored as {info.dtype}")
    table = Table()
    for heading in ("split", "documents", "tokens", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in info.splits.items():
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{len(split.shards):,}")
    Console().print(table)
    if info.skipped_documents:
        print(f"documents skipped because they could not be read: {info.skipped_documents:,}")
    print(f"train on it: --train-dir {root}/train --valid-dir {root}/valid --vocab-size {info.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerFlags(ReadingFlags):
    """Train a tokenizer; every --tokenizer flag accepts the folder that it writes."""

    source: tuple[str, ...]
    """One or more: text, JSON, CSV, Parquet, Arrow (file, folder, pattern, URL), hf:DATASET[:CONFIG[:SPLIT]], `quickstart`."""
    output_dir: str
    """Folder to write tokenizer.json or tokenizer.model to."""
    kind: Kind = "bpe"
    """bpe: byte-level, as GPT-2; sentencepiece: BPE of characters, with byte fallback for rare ones."""
    vocab_size: int = 32768
    """Number of ids, including the 256 bytes and the special tokens."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens, in addition to <|endoftext|>."""
    min_frequency: int | None = None
    """For bpe: a pair that occurs less often is never merged; None means 2."""
    max_lines: int | None = None
    """Learn from at most this many lines of text. None means all."""


def train_tokenizer_command(arguments: Sequence[str]) -> None:
    """Parse the flags, train, and print a summary.

    Raises:
        UserError: see `train_tokenizer`.
    """
    program = "python -m pretrain_xla train-tokenizer"
    flags = parse(TrainTokenizerFlags, arguments, program=program, command="train-tokenizer")
    if flags.min_frequency is not None and flags.kind != "bpe":
        raise UserError(f"--min-frequency {flags.min_frequency}: --kind {flags.kind} has no such limit: leave it out")
    tokenizer = train_tokenizer(
        flags.open(flags.source).documents(),
        flags.vocab_size,
        flags.output_dir,
        kind=flags.kind,
        special_tokens=flags.special_tokens,
        min_frequency=2 if flags.min_frequency is None else flags.min_frequency,
        max_lines=flags.max_lines,
    )
    print(f"{redacted(tokenizer.name)}: {tokenizer.vocab_size:,} ids")
