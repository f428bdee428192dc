"""Tokens a second of `prepare`, beside the plain loop that it replaces, Hugging Face's `tokenizers`, and tiktoken's own limit.

    python benchmarks/tokenize.py

Each contender turns the same documents (in memory) into uint16 shards of GPT-2 ids on disk, on the same cores, in a fresh
process, and they take turns, so that a busy machine is unkind to all of them alike:

- ours: `prepare`, with everything that it does (the split by hashes, checksums, the journal, its processes' start);
- plain: a `multiprocessing.Pool`, `encode_ordinary` for each document, `np.array`, a buffer and `np.save`;
- tokenizers: `encode_batch_fast` in batches of 1,000 documents, with its own threads;
- limit: cores x what one core does in `encode_ordinary_batch`, lists of ids in memory and nothing else.

Shown by the clock, and by the processor time of all processes together, which other work on the machine disturbs less.

Then, on one core and by processor time, BitBPE against its base. Without real text it takes Python's documentation.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
import tyro
from rich.console import Console
from rich.table import Table

from pretrain_xla.errors import guarded
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.prepare.encode import document_encoder
from pretrain_xla.text.corpus import quickstart_documents
from pretrain_xla.text.sources import join_sources, open_source, source_of
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer

MODULE = "benchmarks.tokenize_speed"
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
ENGLISH = (SHARED / "text/en/openstax.jsonl.gz", SHARED / "text/en/novels.jsonl.gz")
CHINESE = SHARED / "text/zh/wikipedia_hans.jsonl.gz"
SHARD_SIZE = 10_000_000


@dataclass(frozen=True)
class Flags:
    """Compare ways to tokenise."""

    text: tuple[str, ...] = tuple(map(str, ENGLISH))
    """Any sources of `prepare`."""
    rounds: int = 3
    """Turns of each contender; the median counts."""
    cores: int = len(os.sched_getaffinity(0))
    """Processes, or threads."""
    only: str | None = None
    """Internal: run this contender alone, and print its figures as JSON."""


@guarded
def main(arguments: Sequence[str]) -> None:
    flags = tyro.cli(Flags, args=list(arguments))
    if SHARED.exists():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
    if flags.only:
        documents = _documents(flags.text)
        before = _processor_seconds()
        tokens, seconds = CONTENDERS[flags.only](documents, flags.cores)
        print(json.dumps({"tokens": tokens, "seconds": seconds, "processor": _processor_seconds() - before}))
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(flags.rounds):
        for name in CONTENDERS:
            figures[name].append(_figures(flags, name))
    _show("by the clock", "seconds", figures, flags)
    _show("by processor time of all processes", "processor", figures, flags)
    _show_bitbpe()


def _processor_seconds() -> float:
    """Of this process and of its children that have ended; the server that forks workers is one of them, and is ended."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    return sum(os.times()[:4])


def _figures(flags: Flags, name: str) -> dict[str, float]:
    words = ["--only", name, "--text", *flags.text, "--cores", str(flags.cores)]
    ended = subprocess.run([sys.executable, "-m", MODULE, *words], check=True, capture_output=True, text=True, cwd=ROOT)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def _show(how: str, key: str, figures: dict[str, list[dict[str, float]]], flags: Flags) -> None:
    # By the clock the limit is that of all cores; by processor time, of which each core gives a second a second, of one.
    rates = {name: [each["tokens"] / each[key] for each in found] for name, found in figures.items()}
    table = Table(
        title=f"{' '.join(map(os.path.basename, flags.text))}, GPT-2, {flags.cores} cores, {flags.rounds} rounds, {how}"
    )
    for heading in ("", "M tokens/s (median)", "all", "ours / it (median of rounds)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, found in rates.items():
        ratio = statistics.median(ours / it for ours, it in zip(rates["ours"], found, strict=True))
        each = " ".join(f"{rate / 1e6:.2f}" for rate in found)
        table.add_row(name, f"{statistics.median(found) / 1e6:.2f}", each, f"{ratio:.2f}")
    Console(width=120).print(table)


def _documents(names: Sequence[str]) -> list[str]:
    if not all(map(os.path.exists, names)) and names == Flags.text:
        return list(quickstart_documents()) * 8
    return list(join_sources([open_source(name) for name in names]).documents())


def ours(documents: list[str], cores: int) -> tuple[int, float]:
    source = source_of("memory", "1", lambda: documents)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        info = prepare(source, folder, shard_size=SHARD_SIZE, valid_fraction=0.01, num_workers=cores, progress=False)
        seconds = time.perf_counter() - begun
    return sum(split.tokens for split in info.splits.values()), seconds


def plain(documents: list[str], cores: int) -> tuple[int, float]:
    with tempfile.TemporaryDirectory() as folder:
        tiktoken.get_encoding("gpt2")
        begun = time.perf_counter()
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            tokens = _write(pool.imap(_plain_ids, documents, chunksize=16), folder)
        return tokens, time.perf_counter() - begun


def _plain_ids(text: str) -> np.ndarray:
    encoding = tiktoken.get_encoding("gpt2")
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(text)])
    assert (ids >= 0).all()
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def huggingface(documents: list[str], cores: int) -> tuple[int, float]:
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    tokenizer = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizers/gpt2_hf/tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        batches = (documents[first : first + 1000] for first in range(0, len(documents), 1000))
        encoded = (item for batch in batches for item in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        tokens = _write((np.array([end, *item.ids], np.uint16) for item in encoded), folder)
        return tokens, time.perf_counter() - begun


def _write(arrays: object, folder: str) -> int:
    """Fill a buffer, and save it as a shard whenever it is full."""
    buffer, filled, shards, total = np.empty(SHARD_SIZE, np.uint16), 0, 0, 0
    for ids in arrays:  # type: ignore[attr-defined]
        total += len(ids)
        while filled + len(ids) >= SHARD_SIZE:
            fits = SHARD_SIZE - filled
            buffer[filled:] = ids[:fits]
            np.save(f"{folder}/{shards:06d}.npy", buffer)
            ids, filled, shards = ids[fits:], 0, shards + 1
        buffer[filled : filled + len(ids)] = ids
        filled += len(ids)
    np.save(f"{folder}/{shards:06d}.npy", buffer[:filled])
    return total


def limit(documents: list[str], cores: int) -> tuple[int, float]:
    encoding = tiktoken.get_encoding("gpt2")
    tokens, seconds = 0, 0.0
    for first in range(0, len(documents), 500):
        begun = time.perf_counter()
        encoded = encoding.encode_ordinary_batch(documents[first : first + 500], num_threads=1)
        seconds += time.perf_counter() - begun
        tokens += sum(map(len, encoded))
    return tokens, seconds / cores


CONTENDERS: dict[str, Callable[[list[str], int], tuple[int, float]]] = {"ours": ours, "plain": plain, "limit": limit}
if (SHARED / "tokenizers/gpt2_hf").exists():
    CONTENDERS["tokenizers"] = huggingface


def _show_bitbpe() -> None:
    table = Table(title="BitBPE, one core, processor time; the base's tokens in M a second")
    for heading in ("base", "text", "base alone", "with BitBPE", "ratio"):
        table.add_column(heading, justify="left" if heading in ("base", "text") else "right")
    models = SHARED / "tokenizers/sentencepiece_4096.model"
    for name in ("gpt2", "cl100k_base", *([str(models)] if models.exists() else [])):
        for file in filter(Path.exists, (ENGLISH[0], CHINESE)):
            with gzip.open(file, "rt") as lines:
                texts = [json.loads(line)["text"] for line, _ in zip(lines, range(400), strict=False)]
            base = load_tokenizer(name)
            rates = {True: 0.0, False: 0.0}
            for _ in range(3):
                for packed in rates:
                    rates[packed] = max(rates[packed], _alone(BitBPETokenizer("", base) if packed else base, texts))
            cells = [f"{rates[packed] / 1e6:.2f}" for packed in (False, True)]
            table.add_row(os.path.basename(name), file.name, *cells, f"{rates[True] / rates[False]:.2f}")
    Console(width=120).print(table)


def _alone(tokenizer: object, texts: list[str]) -> float:
    encode = document_encoder(tokenizer)  # type: ignore[arg-type]
    encode(texts[:20])
    begun = time.process_time()
    ids = encode(texts)
    seconds = time.process_time() - begun
    if isinstance(tokenizer, BitBPETokenizer):
        ids = tokenizer.unpack(ids)
    return len(ids) / seconds


if __name__ == "__main__":
    main(sys.argv[1:])
