"""Speed of `prepare`, against the simple loop that it replaces, Hugging Face's `tokenizers`, and what tiktoken alone could do:
`python benchmarks/tokenization.py`, a few minutes on two cores.

Each method turns the same documents (in memory) into uint16 shards of GPT-2 ids on disk, on the same cores, in a new process.
The methods alternate, so that other load on the machine affects all of them alike:

* ours: `prepare`, with everything that it does (splitting by hash, checksums, the journal, starting its processes).
* plain: a `multiprocessing.Pool`, `encode_ordinary` for each document, `np.array`, a buffer and `np.save`.
* tokenizers: `encode_batch_fast` in batches of 1,000 documents, with its own threads.
* limit: cores x what one core does in `encode_ordinary_batch`, with lists of ids in memory and nothing else.

It prints tokens/s by wall-clock time, and by the CPU time of all processes, which other load affects less.

Then, on one core and by CPU time: encoding alone, with a warm cache, against tiktoken's `encode_ordinary`; and BitBPE against
its base. Without the real texts it uses Python's documentation.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_xla.errors import guarded
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.prepare.encode import document_encoder
from pretrain_xla.text.corpus import quickstart_documents
from pretrain_xla.text.sources import join_sources, open_source, source_of
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ENGLISH = (SHARED / "text/en/openstax.jsonl.gz", SHARED / "text/en/novels.jsonl.gz")
CHINESE = SHARED / "text/zh/wikipedia_hans.jsonl.gz"
SHARD_SIZE = 10_000_000
DOCUMENTS_ALONE = 400


@dataclass(frozen=True)
class Flags:
    """Compare the speed of ways to tokenize."""

    text: tuple[str, ...] = tuple(map(str, ENGLISH))
    """Any sources of `prepare`."""
    rounds: int = 3
    """Runs of each method; the median counts."""
    cores: int = len(os.sched_getaffinity(0))
    """Processes, or threads."""
    only: str | None = None
    """Internal: run this method alone, and print its measurements as JSON."""


@guarded
def main(arguments: Sequence[str]) -> None:
    flags = tyro.cli(Flags, args=list(arguments))
    if SHARED.exists():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
    if flags.only:
        documents = _documents(flags.text)
        before = _cpu_seconds()
        tokens, seconds = METHODS[flags.only](documents, flags.cores)
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": _cpu_seconds() - before}))
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(flags.rounds):
        for name in METHODS:
            figures[name].append(_figures(flags, name))
    _show("by wall-clock time", "seconds", figures, flags)
    _show("by CPU time of all processes", "cpu", figures, flags)
    _show_encoding(_documents(flags.text)[:DOCUMENTS_ALONE])
    _show_bitbpe()


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended; ends the fork server, so that it is counted."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    return sum(os.times()[:4])


def _figures(flags: Flags, name: str) -> dict[str, float]:
    arguments = ["--only", name, "--text", *flags.text, "--cores", str(flags.cores)]
    ended = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def _show(how: str, key: str, figures: dict[str, list[dict[str, float]]], flags: Flags) -> None:
    # By wall-clock time the rates are of all cores, by CPU time of one core.
    rates = {name: [each["tokens"] / each[key] for each in found] for name, found in figures.items()}
    table = Table(
        title=f"{' '.join(map(os.path.basename, flags.text))}, GPT-2, {flags.cores} cores, {flags.rounds} rounds, {how}"
    )
    for heading in ("", "M tokens/s (median)", "all", "ours / this (median of rounds)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, found in rates.items():
        ratio = statistics.median(ours / other for ours, other in zip(rates["ours"], found, strict=True))
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
    """Fill a buffer, and save it as a shard whenever it is full; returns the number of tokens."""
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


METHODS: dict[str, Callable[[list[str], int], tuple[int, float]]] = {"ours": ours, "plain": plain, "limit": limit}
if (SHARED / "tokenizers/gpt2_hf").exists():
    METHODS["tokenizers"] = huggingface


def _show_encoding(texts: list[str]) -> None:
    encode, encoding = document_encoder(load_tokenizer("gpt2")), tiktoken.get_encoding("gpt2")
    encode(texts)
    ratios = []
    for _ in range(3):
        begun = time.process_time()
        tokens = len(encode(texts))
        between = time.process_time()
        for text in texts:
            encoding.encode_ordinary(text)
        rates = [tokens / seconds / 1e6 for seconds in (between - begun, time.process_time() - between)]
        ratios.append(rates[0] / rates[1])
    print(
        f"encoding alone, one core, CPU time: ours {rates[0]:.1f}M tokens/s, tiktoken {rates[1]:.1f}M; "
        f"ours / tiktoken {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})\n"
    )


def _show_bitbpe() -> None:
    table = Table(title="BitBPE, one core, CPU time; millions of the base's tokens per second")
    for heading in ("base", "text", "base alone", "with BitBPE", "ratio"):
        table.add_column(heading, justify="left" if heading in ("base", "text") else "right")
    models = SHARED / "tokenizers/sentencepiece_4096.model"
    for name in ("gpt2", "cl100k_base", *([str(models)] if models.exists() else [])):
        for file in filter(Path.exists, (ENGLISH[0], CHINESE)):
            with gzip.open(file, "rt") as lines:
                texts = [json.loads(line)["text"] for line, _ in zip(lines, range(DOCUMENTS_ALONE), strict=False)]
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
