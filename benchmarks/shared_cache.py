"""Four processes that read one remote file through a cache on their disk: `python benchmarks/shared_cache.py`, ten seconds.

Ours (`pretrain_xla/storage/cache.py`) against fsspec's `filecache`, over a web server on loopback. For each: how often the
server was asked for the file, and how many of the processes got all of it.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES, BYTES = 4, 32_000_000


def filecache(url: str, folder: str, start: Barrier) -> None:
    """Read through fsspec."""
    import fsspec

    start.wait()
    with fsspec.open(f"filecache::{url}", filecache={"cache_storage": folder}) as file:
        sys.exit(len(file.read()) != BYTES)


def ours(url: str, folder: str, start: Barrier) -> None:
    """Read through the cache of shards."""
    import fsspec

    from pretrain_xla.storage.cache import ShardCache

    def fill(path: str) -> None:
        fs, remote = fsspec.core.url_to_fs(url)
        Path(path).write_bytes(fs.cat_file(remote))

    start.wait()
    entry = ShardCache(folder, 10**9).obtain("shard", BYTES, fill)
    complete = len(entry.map()) == BYTES
    entry.close()
    sys.exit(not complete)


def main() -> None:
    from tests.servers import WebServer

    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "shard.bin").write_bytes(bytes(BYTES))
        for way in (filecache, ours):
            start = spawn.Barrier(PROCESSES)
            with WebServer(Path(folder)) as server, tempfile.TemporaryDirectory() as cache:
                arguments = (f"{server.address}/shard.bin", cache, start)
                processes = [spawn.Process(target=way, args=arguments) for _ in range(PROCESSES)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                complete = sum(process.exitcode == 0 for process in processes)
                print(f"{way.__name__:10} {len(server.requests)} requests, {complete} of {PROCESSES} got all of it")


if __name__ == "__main__":
    main()
