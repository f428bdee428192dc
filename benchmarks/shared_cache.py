"""Our cache of shards against fsspec's three, out of a bucket: `python benchmarks/shared_cache.py`, about two minutes.

The bucket is an emulator on loopback, and a shard has 32 MB. For each cache:

1. Shared: four processes ask for the same shard at once. How many times its size was sent, and how many processes got it right.
2. Killed: a process is killed during its download. Whether the next one gets the shard right.
3. Replaced: the object is overwritten with one of the same size. Whether the next process gets the new one.
4. Bounded: four shards are read one after the other. How many times the size of a shard is on the disk afterwards.

Ours has room for two shards and a half. fsspec's have no such option; `filecache` and `blockcache` run with `check_files`.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES, TOKENS = 4, 16_000_000
BYTES = 128 + 2 * TOKENS  # NumPy's header, and uint16
WAYS = ("simplecache", "filecache", "blockcache", "ours")
SPAWN = multiprocessing.get_context("spawn")


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, TOKENS).astype(np.uint16)


def read(way: str, url: str, folder: str) -> bytes:
    """The SHA-256 of a shard's tokens, read through a cache."""
    import fsspec

    from pretrain_xla.config import DataConfig
    from pretrain_xla.data.shard_loader import ShardLoader
    from pretrain_xla.data.shards import open_shard
    from pretrain_xla.storage.files import filesystem

    if way == "ours":
        shard = open_shard(*filesystem(url))
        loader = ShardLoader(
            [shard], {}, DataConfig(cache_dir=folder, cache_gb=2.5 * BYTES / 1e9, remote_reads="whole")
        )
        found: Any = loader.tokens(0).rows(np.array([0]), shard.tokens)  # type: ignore[union-attr]
    else:
        options: dict[str, object] = {"cache_storage": folder}
        if way != "simplecache":
            options["check_files"] = True
        with fsspec.open(f"{way}::{url}", **{way: options}) as file:
            found = file.read()[128:]
    return hashlib.sha256(found).digest()


def reader(way: str, url: str, folder: str, expected: bytes, start: Any) -> None:
    """A process that ends with status 0 where it got the shard right."""
    if start is not None:
        start.wait()
    try:
        right = read(way, url, folder) == expected
    except Exception as error:
        print(f"{way}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
        right = False
    os._exit(not right)


def killed_reader(way: str, url: str, folder: str) -> None:
    """A process that is killed as soon as some of the shard is in the cache."""

    def watch() -> None:
        while not any(path.stat().st_blocks for path in Path(folder).glob("*") if path.name not in ("cache", ".lock")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    read(way, url, folder)


def finish(process: Any) -> int:
    process.start()
    process.join()
    return int(process.exitcode)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from pretrain_xla.data.shards import write_shard
    from pretrain_xla.storage.files import filesystem
    from tests.servers import FaultyProxy, gcs_emulator, gcs_environment, upload

    with gcs_emulator() as address, FaultyProxy(address) as proxy, tempfile.TemporaryDirectory() as scratch:
        os.environ.update(gcs_environment(proxy.address))

        def put(name: str, seed: int) -> tuple[str, bytes]:
            with tempfile.TemporaryDirectory() as folder:
                fs, root = filesystem(folder)
                write_shard(fs, f"{root}/{name}.npy", tokens(seed))
                digest = hashlib.sha256(tokens(seed).data).digest()
                return f"{upload(address, Path(folder), 'shards')}/{name}.npy", digest

        def sent() -> float:
            media = [span for path, *span in proxy.requests if "alt=media" in path]
            return sum(BYTES if end is None else min(end, BYTES) - (begin or 0) for begin, end in media) / BYTES

        print(f"{'':12} {'sent':>6} {'right':>8} {'after a kill':>14} {'replaced':>10} {'on the disk':>12}")
        for way in WAYS:
            url, expected = put("shared", 0)
            proxy.requests.clear()
            start = SPAWN.Barrier(PROCESSES)
            arguments = (way, url, f"{scratch}/{way}-shared", expected, start)
            readers = [SPAWN.Process(target=reader, args=arguments) for _ in range(PROCESSES)]
            for process in readers:
                process.start()
            for process in readers:
                process.join()
            right, shared = sum(process.exitcode == 0 for process in readers), sent()

            (killed := Path(scratch, f"{way}-killed")).mkdir()
            status = finish(SPAWN.Process(target=killed_reader, args=(way, url, str(killed))))
            assert status == -signal.SIGKILL, f"{way}: not killed during its download, status {status}"
            after_kill = finish(SPAWN.Process(target=reader, args=(way, url, str(killed), expected, None))) == 0

            folder = f"{scratch}/{way}-replaced"
            assert finish(SPAWN.Process(target=reader, args=(way, url, folder, expected, None))) == 0
            url, expected = put("shared", 1)
            replaced = finish(SPAWN.Process(target=reader, args=(way, url, folder, expected, None))) == 0

            bounded = Path(scratch, f"{way}-bounded")
            for number in range(4):
                url, expected = put(f"one-{number}", number)
                assert finish(SPAWN.Process(target=reader, args=(way, url, str(bounded), expected, None))) == 0
            size = sum(path.stat().st_size for path in bounded.iterdir()) / BYTES
            words = ["right" if good else "wrong" for good in (after_kill, replaced)]
            print(
                f"{way:12} {shared:>6.1f} {right:>3} of {PROCESSES} {words[0]:>14} {words[1]:>10} {size:>12.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
