"""Random damage to prepared datasets, shards of other programs and cached copies: `python benchmarks/corrupt_data.py`.

Each trial copies a small dataset, damages one file of it (a flipped bit, truncation, zeros, swapped or deleted files, ...), and
reads it as a run does: all of its sequences from a disk, or from a bucket whole, by ranges or out of the cache, and its
tokenizer. The damage must be refused in one line that names a file, or do no harm: everything read is what was written. It is
a failure if other tokens are read without a word, or if it ends in a stack trace.

The bucket is fsspec's file system in memory, which is as remote to the loader as any other.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_xla.config import DataConfig
from pretrain_xla.data import token_file
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.checksums import write_checksums
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.data.manifest import DatasetInfo
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.storage import cache
from pretrain_xla.text.sources import source_of
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import is_stored

LENGTH, VOCAB_SIZE = 64, 300
FORMATS = ("npy", "bin", "parquet")
WAYS = ("disk", "whole", "ranged", "cached")
Damage = Callable[[random.Random, Path, list[Path]], None]


def flip(random: random.Random, victim: Path, others: list[Path]) -> None:
    """One bit, or up to eight."""
    raw = bytearray(victim.read_bytes())
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    victim.write_bytes(raw)


def truncate(random: random.Random, victim: Path, others: list[Path]) -> None:
    os.truncate(victim, random.choice((0, random.randrange(victim.stat().st_size), victim.stat().st_size - 1)))


def extend(random: random.Random, victim: Path, others: list[Path]) -> None:
    victim.write_bytes(victim.read_bytes() + random.randbytes(random.choice((1, 2, 128, 4096))))


def zero(random: random.Random, victim: Path, others: list[Path]) -> None:
    """A tail, as after a power failure, or a stretch in between."""
    raw = bytearray(victim.read_bytes())
    begin = random.randrange(len(raw))
    end = random.choice((len(raw), min(len(raw), begin + 512)))
    raw[begin:end] = bytes(end - begin)
    victim.write_bytes(raw)


def shift(random: random.Random, victim: Path, others: list[Path]) -> None:
    """A stretch is copied over another, as by a lost write."""
    raw = bytearray(victim.read_bytes())
    size = min(512, len(raw) // 3)
    to, begin = random.randrange(len(raw) - size), random.randrange(len(raw) - size)
    raw[to : to + size] = raw[begin : begin + size]
    victim.write_bytes(raw)


def swap(random: random.Random, victim: Path, others: list[Path]) -> None:
    other = random.choice(others)
    first, second = victim.read_bytes(), other.read_bytes()
    victim.write_bytes(second)
    other.write_bytes(first)


def copy_over(random: random.Random, victim: Path, others: list[Path]) -> None:
    victim.write_bytes(random.choice(others).read_bytes())


def delete(random: random.Random, victim: Path, others: list[Path]) -> None:
    victim.unlink()


DAMAGES: tuple[Damage, ...] = (flip, flip, truncate, extend, zero, shift, swap, copy_over, delete)


def make_datasets(folder: Path) -> dict[str, Path]:
    """A dataset of each format with its own tokenizer, and a folder of shards of another program with `checksums.json`."""
    words = np.random.default_rng(0).integers(0, 500, 12_000).tolist()
    texts = [" ".join(f"word{word}" for word in words[start : start + 60]) for start in range(0, len(words), 60)]
    made = {}
    for format in FORMATS:
        made[format] = folder / format
        prepare(
            source_of("words", "1", lambda: texts),
            str(made[format]),
            train_vocab_size=VOCAB_SIZE,
            shard_size=12_000,
            valid_fraction=0.2,
            num_workers=1,
            format=format,  # type: ignore[arg-type]
        )
    foreign = made["foreign"] = folder / "foreign"
    for split in ("train", "valid"):
        shutil.copytree(made["npy"] / split, foreign / split)
        shards = open_dataset(str(foreign / split), LENGTH, VOCAB_SIZE).shards
        write_checksums(str(foreign / split), shards, {shard.name: VOCAB_SIZE - 1 for shard in shards})
    return made


def read_all(root: str, way: str, cache_dir: str, is_foreign: bool) -> tuple[Any, ...]:
    """All that a run takes from a dataset: its sequences, its manifest, its tokenizer."""
    found: list[Any] = []
    mode = "whole" if way == "cached" else way
    parquet = root.endswith("parquet")
    settings = DataConfig(cache_dir=cache_dir, remote_reads="auto" if way == "disk" or parquet else mode)  # type: ignore[arg-type]
    for split in ("train", "valid"):
        dataset = open_dataset(f"{root}/{split}", LENGTH, VOCAB_SIZE, settings=settings)
        made = Batches(dataset, sequences_per_batch=32, seq_length=LENGTH, seed=1, once=True)
        for step in range(-(-made.sequences_per_epoch // 32)):
            found.append(made.rows(step).tobytes())
    if not is_foreign:
        info = dataset.info
        found.append(info.model_copy(update={"root": ""}) if info is not None else None)
        tokenizer = load_tokenizer(info.tokenizer_name if info is not None else f"{root}/tokenizer")
        assert is_stored(tokenizer)
        found.append(tokenizer.content)
    return tuple(found)


def trial(
    seed: int, originals: dict[str, Path], expected: dict[str, tuple[Any, ...]], scratch: Path
) -> tuple[str, str]:
    """(result, what was done). The results: refused, unharmed, without manifest, without checksums, SILENT, TRACE."""
    random_ = random.Random(seed)
    name, way = random_.choice(sorted(originals)), random_.choice(WAYS)
    folder, copies = scratch / f"{seed}" / name, scratch / f"{seed}" / "cache"
    shutil.copytree(originals[name], folder)
    root = str(folder)
    try:
        if way != "disk":
            root = f"memory://corrupt/{seed}/{name}"
        if way == "cached":
            _upload(folder, root)
            read_all(root, way, str(copies), name == "foreign")
            target = copies
        else:
            target = folder
        files = sorted(path for path in target.rglob("*") if path.is_file() and path.name != ".lock")
        victim, damage = random_.choice(files), random_.choice(DAMAGES)
        others = [path for path in files if path != victim]
        what = f"seed {seed}: {name} {way}: {damage.__name__} {victim.relative_to(target)}"
        damage(random_, victim, others)
        if way in ("whole", "ranged"):
            _upload(folder, root)
        result, why = _result(root, way, str(copies), expected[name], victim.name)
        return result, f"{what}: {result} {why}"
    finally:
        shutil.rmtree(scratch / f"{seed}", ignore_errors=True)  # a thread may still be writing to the cache
        fsspec.filesystem("memory").store.clear()


def _result(root: str, way: str, cache_dir: str, expected: tuple[Any, ...], victim: str) -> tuple[str, str]:
    name = root.rpartition("/")[2]
    token_file._verified.clear()  # as in a new process
    cache._verified.clear()
    try:
        found = read_all(root, way, cache_dir, name == "foreign")
    except UserError as error:
        return "refused" if "\n" not in str(error) and name in str(error) else "TRACE", str(error)
    except BaseException:
        return "TRACE", traceback.format_exc()
    if found == expected:
        return "without checksums" if victim in ("checksums.json", "SHA256SUMS") else "unharmed", ""
    without = tuple(None if isinstance(part, DatasetInfo) else part for part in expected)
    return "without manifest" if found == without and victim == "dataset.json" else "SILENT", ""


def _upload(folder: Path, root: str) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())


def run(count: int, seed: int, scratch: Path) -> tuple[collections.Counter[str], list[str]]:
    """Counts of the results of `count` trials, and the descriptions of the failures."""
    originals = make_datasets(scratch / "originals")
    expected = {
        name: read_all(str(folder), "disk", str(scratch / "first"), name == "foreign")
        for name, folder in originals.items()
    }
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for number in range(seed, seed + count):
        result, what = trial(number, originals, expected, scratch)
        counts[result] += 1
        if result in ("SILENT", "TRACE"):
            failures.append(what)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; each has the next one")
    flags = parser.parse_args()
    logging.getLogger("pretrain_xla").setLevel(logging.ERROR)  # damaged copies in the cache are warnings
    with tempfile.TemporaryDirectory() as scratch:
        counts, failures = run(flags.trials, flags.seed, Path(scratch))
    print(*failures, sep="\n")
    print(", ".join(f"{result}: {count:,}" for result, count in counts.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
