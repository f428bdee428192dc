"""The words of `prepare` and `train-tokenizer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from pretrain_xla.data.manifest import DatasetInfo
from pretrain_xla.data.prepare import prepare
from pretrain_xla.data.shards import WrittenFormat
from pretrain_xla.data.sources import open_source
from pretrain_xla.data.train_tokenizer import train_tokenizer


@dataclass(frozen=True)
class PrepareFlags:
    """Turn text into token shards, in train/ and valid/, with a dataset.json beside them."""

    source: Annotated[str, tyro.conf.Positional]
    """Text file, .jsonl(.gz) file, folder of them, a URL of one; or `quickstart`: the documentation inside Python."""
    output_dir: Annotated[str, tyro.conf.Positional]
    """Folder to write to."""
    tokenizer: str | None = None
    """tiktoken name, tokenizer.json or a folder with one, or `bytes`; none: gpt2."""
    train_vocab_size: int | None = None
    """Instead of --tokenizer: train a BPE of so many ids on the text first."""
    shard_size: int = 100_000_000
    """Tokens in a shard."""
    valid_fraction: float = 0.05
    """Share of the documents held out for validation; for a large corpus much less will do."""
    format: WrittenFormat = "npy"
    """Of the shards: .npy; .bin as llm.c reads it; Parquet with a column input_ids."""
    overwrite: bool = False
    """Replace a dataset that was made otherwise."""


def prepare_command(arguments: Sequence[str]) -> None:
    """Parse, prepare, and say what is there now.

    Raises:
        UserError: see `prepare`.
    """
    flags = tyro.cli(PrepareFlags, prog="python -m pretrain_xla prepare", args=list(arguments))
    info = prepare(
        flags.source,
        flags.output_dir,
        flags.tokenizer,
        train_vocab_size=flags.train_vocab_size,
        shard_size=flags.shard_size,
        valid_fraction=flags.valid_fraction,
        overwrite=flags.overwrite,
        format=flags.format,
    )
    show_dataset(info)


def show_dataset(info: DatasetInfo) -> None:
    """A small table of a dataset."""
    print(f"{os.path.relpath(info.root) if '://' not in info.root else info.root}: ", end="")
    print(f"{info.vocab_size:,} token ids by {info.tokenizer}, stored as {info.dtype}")
    table = Table()
    for heading in ("split", "documents", "tokens", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in info.splits.items():
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{len(split.shards):,}")
    Console().print(table)


@dataclass(frozen=True)
class TrainTokenizerFlags:
    """Train a byte-level BPE tokenizer; the folder it writes is then a --tokenizer everywhere."""

    source: str
    """Text file, .jsonl(.gz) file, folder of them, a URL of one; or `quickstart`."""
    output_dir: str
    """Folder to write tokenizer.json to."""
    vocab_size: int = 32768
    """Number of ids, with the 256 bytes and end-of-text among them."""
    min_frequency: int = 2
    """A pair that occurs less often is never merged."""


def train_tokenizer_command(arguments: Sequence[str]) -> None:
    """Parse, train, and say what is there now.

    Raises:
        UserError: see `train_tokenizer`.
    """
    flags = tyro.cli(TrainTokenizerFlags, prog="python -m pretrain_xla train-tokenizer", args=list(arguments))
    documents = open_source(flags.source).documents()
    tokenizer = train_tokenizer(documents, flags.vocab_size, flags.output_dir, min_frequency=flags.min_frequency)
    print(f"{flags.output_dir}/tokenizer.json: {tokenizer.vocab_size:,} ids")
