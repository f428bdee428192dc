"""Sequence lengths in several languages, without and with BitBPE: `python benchmarks/sequence_lengths.py`, about a minute.

It prints the table of docs/tokenizers.md, in Markdown: tokens per character, and the change that BitBPE makes. Every packed
sequence is unpacked and compared.
"""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_xla.errors import UserError, guarded
from pretrain_xla.prepare.encode import document_encoder
from pretrain_xla.text.sources import open_source
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Flags:
    """Compare sequence lengths by language."""

    folder: str = str(SHARED / "text")
    """Folder with a subfolder of .jsonl.gz files for each language."""
    characters: int = 1_000_000
    """Characters to read from the start of each file."""


@guarded
def main(arguments: Sequence[str]) -> None:
    flags = tyro.cli(Flags, args=list(arguments))
    if SHARED.exists():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
    texts = {
        file.removeprefix(flags.folder).strip("/").removesuffix(".jsonl.gz"): list(_first(file, flags.characters))
        for file in sorted(glob.glob(f"{flags.folder}/*/*.jsonl.gz"))
    }
    if not texts:
        raise UserError(
            f"{flags.folder}: no .jsonl.gz in its subfolders: give a folder with a subfolder for each language"
        )
    with tempfile.TemporaryDirectory() as folder:
        bases = _bases(folder, [text for name, part in texts.items() if name.startswith("en/") for text in part])
        rows = [
            [name, *(_cell(base, part) for base in bases.values())] for name, part in track(texts.items(), console=LOG)
        ]
    print(f"| text | {' | '.join(bases)} |")
    print(f"|---|{'---|' * len(bases)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


LOG = Console(stderr=True)


def _first(file: str, characters: int) -> Iterator[str]:
    for text in open_source(file).documents():
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _bases(folder: str, english: list[str]) -> dict[str, Tokenizer]:
    bases = {"bytes": load_tokenizer("bytes")}
    bases["SentencePiece of English, 8k"] = train_tokenizer(
        english, 8192, f"{folder}/sentencepiece", kind="sentencepiece", max_lines=20_000
    )
    bases["byte-level BPE of English, 8k"] = train_tokenizer(english, 8192, f"{folder}/bpe", max_lines=20_000)
    return {**bases, "gpt2": load_tokenizer("gpt2"), "cl100k_base": load_tokenizer("cl100k_base")}


def _cell(base: Tokenizer, texts: list[str]) -> str:
    tokenizer = BitBPETokenizer("", base)
    plain_N = document_encoder(base)(texts)
    packed_N = tokenizer.pack(plain_N)
    if not np.array_equal(tokenizer.unpack(packed_N), plain_N):
        raise UserError(f"{base.name}: BitBPE does not unpack to what was packed: report this as a bug")
    characters = sum(map(len, texts))
    change = len(packed_N) / len(plain_N) - 1
    return f"{len(plain_N) / characters:.2f} → {len(packed_N) / characters:.2f} ({change:+.1%})"


if __name__ == "__main__":
    main(sys.argv[1:])
