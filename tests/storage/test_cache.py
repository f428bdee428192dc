from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.storage import cache as storage_cache
from pretrain_xla.storage.cache import CacheFullError, ShardCache

ROOT = Path(__file__).resolve().parents[2]


def writes(content):
    def fill(path):
        with open(path, "r+b") as file:
            file.write(content)

    return fill


def never(path):
    raise AssertionError("it is there already")


def names(folder):
    """Without the checksums."""
    found = [path.name for path in folder.iterdir() if path.name != ".lock"]
    return sorted(re.sub(r"\.[0-9a-f]{32}$", "", name) for name in found)


def content(entry):
    return os.pread(entry.descriptor, 1000, 0)


def test_created_once_and_evicted_by_last_use(tmp_path):
    cache = ShardCache(str(tmp_path), 30)
    for key in "abc":
        assert content(cache.obtain(key, 10, writes(key.encode() * 10))) == key.encode() * 10
        time.sleep(0.01)
    cache.obtain("a", 10, never).close()
    cache.obtain("d", 10, writes(b"d" * 10)).close()
    assert names(tmp_path) == ["a", "c", "d"]
    cache.obtain("e", 25, writes(b"e" * 25)).close()
    assert names(tmp_path) == ["e"]


def test_entries_in_use_are_kept_and_block(tmp_path):
    cache = ShardCache(str(tmp_path), 30)
    used = cache.obtain("a", 20, writes(b"a" * 20))
    kept = os.dup(used.descriptor)
    cache.obtain("b", 10, writes(b"b" * 10)).close()
    cache.obtain("c", 10, writes(b"c" * 10)).close()
    assert names(tmp_path) == ["a", "c"]
    with pytest.raises(CacheFullError):
        cache.obtain("d", 20, never)
    assert names(tmp_path) == ["a"]
    used.close()
    os.close(kept)
    cache.obtain("d", 20, writes(b"d" * 20)).close()
    assert names(tmp_path) == ["d"]


def test_a_failed_entry_leaves_nothing(tmp_path):
    cache = ShardCache(str(tmp_path), 30)

    def fail(path):
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        cache.obtain("a", 10, fail)
    assert names(tmp_path) == []
    cache.obtain("a", 10, writes(b"a" * 10)).close()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep shards here"):
        ShardCache(str(tmp_path / "file" / "cache"), 30).obtain("a", 10, never)


def test_a_file_of_another_size_is_not_taken_for_the_entry(tmp_path):
    cache = ShardCache(str(tmp_path), 100)
    cache.obtain("a", 10, writes(b"a" * 10)).close()
    assert content(cache.obtain("a", 12, writes(b"b" * 12))) == b"b" * 12


@pytest.mark.parametrize("damage", [lambda raw: b"A" + raw[1:], lambda raw: raw[:-1], lambda raw: b""])
def test_a_damaged_entry_is_made_again(tmp_path, damage, caplog):
    cache = ShardCache(str(tmp_path), 100)
    cache.obtain("a", 10, writes(b"a" * 10)).close()
    (path,) = (path for path in tmp_path.iterdir() if path.name != ".lock")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    storage_cache._verified.clear()  # as in a new process
    assert content(cache.obtain("a", 10, writes(b"a" * 10))) == whole
    assert "a damaged copy in the cache" in caplog.text
    assert content(cache.obtain("a", 10, never)) == whole


def test_an_unexpected_checksum_leaves_nothing(tmp_path):
    def check(sha256):
        assert len(sha256) == 64
        raise UserError("differs")

    with pytest.raises(UserError, match="differs"):
        ShardCache(str(tmp_path), 30).obtain("a", 10, writes(b"a" * 10), check)
    assert names(tmp_path) == []


def test_concurrent_requests_for_one_entry_create_it_once(tmp_path):
    made, seen = [], []

    def fill(path):
        made.append(path)
        time.sleep(0.1)
        writes(b"x" * 10)(path)

    def want():
        seen.append(content(ShardCache(str(tmp_path), 100).obtain("a", 10, fill)))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), seen) == (1, [b"x" * 10] * 8)


_SLOW = """
import sys, time
from pretrain_xla.storage.cache import ShardCache
def fill(path):
    with open(path, "r+b") as file:
        file.write(b"half")
        file.flush()
        print("begun", flush=True)
        time.sleep(60)
ShardCache(sys.argv[1], 100).obtain("a", 10, fill)
"""


def test_a_killed_process_leaves_no_partial_entry_and_no_lock(tmp_path):
    slow = subprocess.Popen([sys.executable, "-c", _SLOW, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert slow.stdout is not None
    assert slow.stdout.readline() == "begun\n"
    assert names(tmp_path) == ["a.partial"]
    done = []
    waiting = threading.Thread(
        target=lambda: done.append(content(ShardCache(str(tmp_path), 100).obtain("a", 10, writes(b"x" * 10))))
    )
    waiting.start()
    time.sleep(0.2)
    assert not done  # while the other one is at work
    slow.kill()
    slow.wait()
    waiting.join(10)
    assert done == [b"x" * 10]
    assert names(tmp_path) == ["a"]


def test_partial_files_of_a_killed_process_are_evicted(tmp_path):
    (tmp_path / "b.partial").write_bytes(b"x" * 90)
    ShardCache(str(tmp_path), 100).obtain("a", 20, writes(b"x" * 20)).close()
    assert names(tmp_path) == ["a"]


_HOLD = """
import sys, time
from pretrain_xla.storage.cache import ShardCache
def fill(path):
    open(path, "r+b").write(b"x" * 60)
entry = ShardCache(sys.argv[1], 100).obtain("a", 60, fill)
print("held", flush=True)
time.sleep(60)
"""


def test_an_entry_that_another_process_uses_is_not_evicted(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    cache = ShardCache(str(tmp_path), 100)
    with pytest.raises(CacheFullError):
        cache.obtain("b", 60, never)
    holder.kill()
    holder.wait()
    cache.obtain("b", 60, writes(b"x" * 60)).close()
    assert names(tmp_path) == ["b"]


def test_eviction_tolerates_files_that_appear_and_disappear(tmp_path):
    cache = ShardCache(str(tmp_path), 90)
    begin, errors = threading.Barrier(6), []

    def work(thread):
        begin.wait()
        try:
            for turn in range(150):
                key = f"{thread}_{turn % 4}"
                assert content(cache.obtain(key, 10, writes(key.encode().ljust(10)))) == key.encode().ljust(10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 90
