"""Speed of data loading from a local disk and from a bucket, and how long a step waits for it: `python benchmarks/loading.py`.

It takes about five minutes on two cores. The bucket is an emulator on loopback.

1. Rate: batches one after another, as fast as possible, pinned to one core, for each format and several sequence lengths.
2. Waiting: a simulated step of 50 ms, with batches prefetched by the trainer's own pipeline; the share of the time that it
   waits for input, after the first batch.
3. Memory: as many steps as an hour of 50 ms steps, without the sleeping, and a thirty-sixth of them from the bucket; anonymous
   memory and resident memory over time. A leak shows in anonymous memory; the operating system can reclaim mapped pages.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_xla.config import DataConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.data.prefetch import pipeline
from pretrain_xla.data.shards import write_shard
from pretrain_xla.storage.files import filesystem

STEP_SECONDS = 0.050
TOKENS_PER_BATCH = 2**18
SHARDS, SHARD_TOKENS = 12, 8_000_000


def write_shards(folder: Path, format: str) -> None:
    fs, _ = filesystem(str(folder))
    for number in range(SHARDS):
        tokens = np.random.default_rng(number).integers(0, 50257, SHARD_TOKENS).astype(np.uint16)
        write_shard(fs, f"{folder}/{number:03d}.{format}", tokens, format)  # type: ignore[arg-type]


def batches(target: str, cache: str, seq_length: int = 1024, share: float = 1.0, **settings: object) -> Batches:
    data = DataConfig(cache_dir=cache, shuffle_window=4, **settings)  # type: ignore[arg-type]
    dataset = open_dataset(target, seq_length, 50257, settings=data)
    count = TOKENS_PER_BATCH // seq_length
    return Batches(dataset, sequences_per_batch=count, seq_length=seq_length, seed=1, shuffle_window=4, share=share)


def rate(target: str, cache: str, seq_length: int) -> tuple[float, float]:
    """Seconds to the first batch, and million tokens per second after it, over one epoch."""
    begin = time.perf_counter()
    made = batches(target, cache, seq_length)
    made.rows(0)
    first, begin = time.perf_counter() - begin, time.perf_counter()
    steps = made.sequences_per_epoch // made.sequences_per_batch
    for step in range(1, steps):
        made.rows(step)
    return first, (steps - 1) * TOKENS_PER_BATCH / (time.perf_counter() - begin) / 1e6


def waiting(made: Batches, steps: int, rows: slice) -> tuple[float, float]:
    """Seconds until the first batch, and the share of the time after it that a step of 50 ms waits for input."""
    begin = time.perf_counter()
    with pipeline(lambda step: made.rows(step, rows), lambda tokens: tokens, 0, steps, 2, made.threads) as items:
        next(items)
        first, begin, before = time.perf_counter() - begin, time.perf_counter(), items.seconds_waited
        for _ in items:
            time.sleep(STEP_SECONDS)
        return first, (items.seconds_waited - before) / (time.perf_counter() - begin)


def memory() -> tuple[float, float]:
    """Anonymous and resident memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    found = [re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS")]
    anonymous, resident = (int(match[1]) / 1e3 if match else float("nan") for match in found)
    return anonymous, resident


def print_memory(name: str, made: Batches, steps: int, rows: slice = slice(None)) -> None:
    print(f"\nmemory over {steps:,} steps, {name}, threads: {made.threads}; MB")
    print(f"{'step':>8} {'anonymous':>10} {'resident':>10}")
    with pipeline(lambda step: made.rows(step, rows), lambda tokens: tokens, 0, steps, 2, made.threads) as items:
        for step, _ in enumerate(items):
            if step in (10, 100) or step % (steps // 8) == 0 or step == steps - 1:
                print(f"{step:>8,} {memory()[0]:>10.1f} {memory()[1]:>10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of the simulated run whose waiting is measured")
    parser.add_argument("--hour", type=int, default=72_000, help="steps of the run whose memory is measured")
    flags = parser.parse_args()
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as scratch:
        for format in ("npy", "bin", "parquet"):
            (folder := Path(scratch, format)).mkdir()
            write_shards(folder, format)
        print(f"{SHARDS} shards of {SHARD_TOKENS / 1e6:.0f}M tokens, batches of {TOKENS_PER_BATCH:,} tokens\n")
        print("from a local disk, one core: format, sequence length, seconds to the first batch, M tokens/s after it")
        os.sched_setaffinity(0, {min(cores)})
        for format, length in (("npy", 1024), ("bin", 1024), ("parquet", 1024), ("npy", 128), ("npy", 8192)):
            first, after = rate(f"{scratch}/{format}", f"{scratch}/cache", length)
            print(f"{format:>8} {length:>6} {first:>8.2f} {after:>9.1f}", flush=True)
        os.sched_setaffinity(0, cores)
        made = batches(f"{scratch}/npy", f"{scratch}/cache")
        print(
            f"\na step of {STEP_SECONDS * 1e3:.0f} ms: seconds to the first batch, share of the time spent waiting after it"
        )
        first, share = waiting(made, flags.steps, slice(None))
        print(f"{'local disk':>40} {first:>7.2f} {share:>8.4%}", flush=True)
        from_bucket(scratch, flags.steps, flags.hour // 36)
        print_memory("local disk", batches(f"{scratch}/npy", f"{scratch}/cache"), flags.hour)


def from_bucket(scratch: str, steps: int, memory_steps: int) -> None:
    """The same from the emulator: whole shards, and by ranges the rows of one host of many.

    The emulator, a single Python process, limits the requests per second.
    """
    from tests.servers import gcs_emulator, gcs_environment, upload

    with gcs_emulator() as address:
        os.environ.update(gcs_environment(address))
        target = upload(address, Path(scratch, "npy"), "npy")
        first, after = rate(target, f"{scratch}/cold", 1024)
        print(f"{'emulator, whole shards, no step':>40} {first:>7.2f} {after:>8.1f} M tokens/s", flush=True)
        first, share = waiting(batches(target, f"{scratch}/cold2"), steps, slice(None))
        print(f"{'emulator, whole shards':>40} {first:>7.2f} {share:>8.4%}", flush=True)
        for hosts in (64, 8):
            part, rows = batches(target, f"{scratch}/never", share=1 / hosts), TOKENS_PER_BATCH // 1024 // hosts
            first, share = waiting(part, steps, slice(0, rows))
            title = f"ranges, one host of {hosts}, {rows / STEP_SECONDS:.0f} requests/s"
            print(f"{title:>40} {first:>7.2f} {share:>8.4%}", flush=True)
        # A cache with room for two of three windows, so that shards are evicted.
        tight = batches(target, f"{scratch}/tight", cache_gb=8.5 * SHARD_TOKENS * 2 / 1e9)
        print_memory("emulator, whole shards", tight, memory_steps)
        part = batches(target, f"{scratch}/never", share=1 / 64)
        print_memory("emulator, ranges", part, memory_steps, slice(0, TOKENS_PER_BATCH // 1024 // 64))


if __name__ == "__main__":
    main()
