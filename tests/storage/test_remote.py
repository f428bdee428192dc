"""Shards from a bucket and from the web: real gcsfs, a real emulator in its own process, and a proxy that injects errors."""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import itertools
import json
import re
import threading
import time

import fsspec
import numpy as np
import pytest

from pretrain_xla.config import DataConfig
from pretrain_xla.data import shard_loader
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.block_checksums import BLOCK_BYTES
from pretrain_xla.data.dataset import open_dataset, open_shards
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.storage import cache, remote, retries
from pretrain_xla.storage.files import filesystem, write_atomically
from pretrain_xla.text.sources import open_source, source_of
from tests.servers import BUCKET, FaultyProxy, WebServer, free_port, gcs_emulator, process, upload
from tests.shard_writers import WRITERS

TOKENS = 30_000


@pytest.fixture(scope="module")
def emulator():
    with gcs_emulator() as address:
        yield address


@pytest.fixture
def proxy(emulator, monkeypatch):
    """In front of the emulator, without errors until a test injects some; `gs://` goes there."""
    with FaultyProxy(emulator) as server:
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": server.address})
        yield server
        server.stalled.set()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """One shard of each format."""
    folder = tmp_path_factory.mktemp("local")
    for number, (name, write) in enumerate(WRITERS.items()):
        write(folder / f"{number}_{name}", np.random.default_rng(number).integers(1, 1000, TOKENS).tolist())
    return folder


@pytest.fixture
def short_retries(monkeypatch):
    monkeypatch.setattr(retries, "RETRY_LIMITS", retries.RetryLimits(1.0, 2.5, 0.05, 0.2, 0.3))


def batches(target, cache_dir, **settings):
    mode = {"cache_dir": str(cache_dir), **settings.pop("data", {})}
    dataset = open_dataset(str(target), 64, 1000, settings=DataConfig(**mode))
    chosen = {"sequences_per_batch": 32, "seq_length": 64, "seed": 3, "shuffle_window": 2, **settings}
    return Batches(dataset, **chosen)


def content(path):
    return "alt=media" in path


def test_every_format_is_the_same_from_a_bucket_as_locally(proxy, emulator, local, tmp_path):
    near, far = batches(local, tmp_path / "a"), batches(upload(emulator, local, "all"), tmp_path / "b")
    assert far.dataset.fingerprint == near.dataset.fingerprint
    assert far.dataset.directory == f"gs://{BUCKET}/all"
    for step in [*range(80), 5]:
        np.testing.assert_array_equal(far.rows(step), near.rows(step))
    # Again, out of the cache: nothing is asked for but listings, headers and footers.
    proxy.requests.clear()
    again = batches(f"gs://{BUCKET}/all", tmp_path / "b")
    np.testing.assert_array_equal(again.rows(0), near.rows(0))
    assert proxy.bytes_requested < 5 * (4096 + 2**16)


@pytest.mark.parametrize("mode", ["whole", "ranged"])
def test_transient_errors_cost_time_and_nothing_else(proxy, emulator, local, tmp_path, short_retries, mode):
    """Each part or range fails once before it succeeds, with each kind of error in turn."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (path for path in local.iterdir() if path.suffix == ".npy"):
        (folder / path.name).write_bytes(path.read_bytes())
    target = upload(emulator, folder, f"faults_{mode}")
    near, far = batches(folder, tmp_path), batches(target, tmp_path / mode, data={"remote_reads": mode})
    kinds, met, harmed = itertools.cycle(["503", "429", "stall", "broken", "short"]), {}, []

    def fault(path, span):
        if not content(path) or (path, span) in met:
            return None
        met[path, span] = next(kinds)
        harmed.append(met[path, span])
        return met[path, span]

    proxy.fault = fault
    for step in range(2 if mode == "ranged" else 5):
        rows = slice(0, 8) if mode == "ranged" else slice(None)
        np.testing.assert_array_equal(far.rows(step, rows), near.rows(step, rows))
    assert set(harmed) >= ({"503", "429", "stall", "broken", "short"} if mode == "ranged" else {"503"})


@pytest.mark.parametrize("fault", ["stall", "short", "503"])
def test_a_clear_error_when_retries_end(proxy, emulator, local, tmp_path, short_retries, fault):
    far = batches(upload(emulator, local, "gone"), tmp_path)
    proxy.fault = lambda path, span: fault if content(path) else None
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        far.rows(0)
    assert time.monotonic() - begin < 10
    assert f"gs://{BUCKET}/gone/" in str(error.value)
    assert "gave up after" in str(error.value)
    reason = {"stall": "no answer within 1 s", "short": "requested bytes came", "503": "no answer within 1 s"}[fault]
    assert reason in str(error.value)
    assert "\n" not in str(error.value)

    def left() -> list[str]:
        return [path.name for path in tmp_path.iterdir() if path.name != ".lock"]

    while left() and time.monotonic() - begin < 120:
        time.sleep(0.05)  # shards that come later are given up, too, in threads of their own
    assert not left()


def test_an_outage_is_said_in_one_line_and_its_end_in_another(proxy, emulator, local, tmp_path, short_retries, caplog):
    """Many requests fail, as when a bucket answers 503 for a minute. Status 425 is one that gcsfs does not retry by itself."""
    target = upload(emulator, local, "outage")
    near, far = batches(local, tmp_path / "a"), batches(target, tmp_path / "b")
    begin = time.monotonic()
    proxy.fault = lambda path, span: "425" if time.monotonic() - begin < 1 else None
    np.testing.assert_array_equal(far.rows(0), near.rows(0))
    said = [record.getMessage() for record in caplog.records if "pretrain_xla" in record.name]
    assert len(said) == 2
    assert re.fullmatch(r"gs://tokens/outage/\S+: .*425.*; trying again, for up to 2 s", said[0])
    assert re.fullmatch(r"gs://tokens/outage/\S+: answers again, after \d s", said[1])


def test_writing_outlives_an_outage(proxy, emulator, short_retries, caplog):
    fs, path = filesystem(f"gs://{BUCKET}/written/a.json")
    begin, proxy.faulty = time.monotonic(), {"POST"}
    proxy.fault = lambda path, span: "425" if time.monotonic() - begin < 1 else None
    checksum = write_atomically(fs, path, (part for part in (b"a", b"b")))
    assert (fs.cat_file(path), checksum) == (b"ab", hashlib.sha256(b"ab").hexdigest())
    assert "trying again, for up to 2 s" in caplog.text
    proxy.fault = lambda path, span: "425"
    with pytest.raises(UserError, match=rf"gs://{BUCKET}/written/b: cannot be written: .*; gave up after \d+ attempts"):
        write_atomically(fs, path.replace("a.json", "b"), [b"b"])


def test_permanent_errors_are_not_retried(proxy, tmp_path):
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"gs://{BUCKET}/nothing: no such folder of token shards"):
        open_dataset(f"gs://{BUCKET}/nothing", 64, 1000)
    with pytest.raises(UserError, match="no such folder"):
        open_dataset("gs://no-such-bucket/x", 64, 1000)
    assert time.monotonic() - begin < 5


def test_each_process_reads_only_its_own_rows(proxy, emulator, local, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (path for path in local.iterdir() if path.suffix == ".npy"):
        (folder / path.name).write_bytes(path.read_bytes())
    target, hosts = upload(emulator, folder, "hosts"), 8
    near, parts = batches(folder, tmp_path), []
    for host in range(hosts):
        far = batches(target, tmp_path / "never", share=1 / hosts)
        assert far.dataset.loader.ranged
        assert far.threads > 1
        proxy.requests.clear()
        parts.append(far.rows(0, slice(4 * host, 4 * host + 4)))
        assert proxy.bytes_requested == 4 * 65 * 2
    np.testing.assert_array_equal(np.concatenate(parts), near.rows(0))
    assert not (tmp_path / "never").exists()


def test_whole_shards_or_ranges_are_chosen_by_need(proxy, emulator, local, tmp_path):
    npy = next(path for path in local.iterdir() if path.suffix == ".npy")
    (folder := tmp_path / "one").mkdir()
    (folder / "0.npy").write_bytes(npy.read_bytes())
    target = upload(emulator, folder, "choice")

    def ranged(data=None, **settings):
        return batches(target, tmp_path / "cache", data=data or {}, **settings).dataset.loader.ranged

    assert not ranged()
    assert ranged(share=1 / 8)
    assert not ranged(share=1 / 2)
    assert ranged(shuffle=False, steps=1)
    assert not ranged(shuffle=False, steps=1, share=20)  # the same few sequences, at many validations
    assert ranged({"cache_gb": 1e-5})
    assert ranged({"remote_reads": "ranged"})
    assert not ranged({"remote_reads": "whole"}, share=1 / 8)
    with pytest.raises(UserError, match="cache_gb=1e-05 is too small for two windows"):
        ranged({"cache_gb": 1e-5, "remote_reads": "whole"})
    upload(emulator, local, "parquet_too")
    with pytest.raises(UserError, match=r"\.parquet: Parquet cannot be read by ranges"):
        batches(f"gs://{BUCKET}/parquet_too", tmp_path, data={"remote_reads": "ranged"})


def held(folder):
    """Bytes of a folder whose files are added and removed meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_next_window_is_fetched_ahead_and_the_last_is_released(proxy, emulator, tmp_path):
    (folder := tmp_path / "shards").mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", np.arange(6401).astype(np.uint16) % 1000)
    size = (folder / "0.npy").stat().st_size
    target = upload(emulator, folder, "ahead")
    # Room for four of six shards: two windows of two.
    far = batches(target, tmp_path / "cache", data={"cache_gb": 4.5 * size / 1e9}, sequences_per_batch=50)

    def fetched():
        return {path for path, begin, end in proxy.requests if content(path) and (begin, end) == (0, size)}

    far.rows(0)
    limit = time.monotonic() + 10
    while len(fetched()) < 4:
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(fetched()) == 4
    for step in range(1, 12):
        far.rows(step)
        assert held(tmp_path / "cache") <= 4.5 * size
    assert len(fetched()) == 6
    whole = [path for path, begin, end in proxy.requests if content(path) and (begin, end) == (0, size)]
    # Two of the first window's shards made room, and are fetched again for the next epoch; nothing else is.
    assert len(whole) <= 8


def test_nothing_is_fetched_beyond_the_last_step(proxy, emulator, tmp_path):
    (folder := tmp_path / "shards").mkdir()
    for number in range(4):
        np.save(folder / f"{number}.npy", np.arange(6401).astype(np.uint16) % 1000)
    far = batches(upload(emulator, folder, "last"), tmp_path / "cache", sequences_per_batch=20, steps=10)
    for step in range(10):
        far.rows(step)
    time.sleep(0.2)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]) == 2


def test_checksums_are_compared_before_a_token_is_used(proxy, emulator, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(200):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text number {number} " * 20)
    prepare(str(tmp_path / "text"), str(tmp_path / "set"), "bytes", valid_fraction=0.3, shard_size=20_000)
    for split in ("train", "valid"):
        path = sorted((tmp_path / "set" / split).iterdir())[0]
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1 if split == "train" else 0
        path.write_bytes(bytes(raw))
    far = upload(emulator, tmp_path / "set", "sums")
    assert dataset_info(f"{far}/train") is not None
    for target in (f"{tmp_path}/set", far):
        settings = DataConfig(cache_dir=str(tmp_path / "cache"))
        good = open_dataset(f"{target}/valid", 64, 257, settings=settings)
        Batches(good, sequences_per_batch=8, seq_length=64, seed=1).rows(0)
        bad = open_dataset(f"{target}/train", 64, 257, settings=settings)
        # One window holds all shards, so that the first batch is as far as one comes.
        batch = Batches(bad, sequences_per_batch=bad.tokens // 64, seq_length=64, seed=1)
        with pytest.raises(UserError, match=r"train/000000\.npy: differs from its checksum"):
            batch.rows(0)


def flip(path, position=-1):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("mode", ["whole", "ranged"])
def test_damage_on_the_way_is_fetched_again_and_damage_in_the_bucket_is_named(proxy, emulator, tmp_path, mode):
    """By checksums of blocks, whether whole shards or ranges are read."""
    documents = [f"document {number} " * 40 for number in range(300)]
    folder = tmp_path / "set"
    prepare(source_of("t", "1", lambda: documents), str(folder), "bytes", valid_fraction=0.1, shard_size=90_000)
    target = f"{upload(emulator, folder, f'blocks_{mode}')}/train"
    near, far = batches(folder / "train", tmp_path), batches(target, tmp_path / "a", data={"remote_reads": mode})
    met = set()

    def fault(path, span):
        first = content(path) and (path, span) not in met
        met.add((path, span))
        return "flipped" if first else None

    proxy.fault = fault
    proxy.requests.clear()
    rows = slice(0, 6) if mode == "ranged" else slice(None)
    np.testing.assert_array_equal(far.rows(0, rows), near.rows(0, rows))
    if mode == "ranged":
        assert proxy.bytes_requested <= 2 * 6 * 2 * BLOCK_BYTES  # each twice
    proxy.fault = lambda path, span: None
    flip(folder / "train" / "000000.npy", 20_000)
    upload(emulator, folder, f"blocks_{mode}")
    far = batches(target, tmp_path / "b", data={"remote_reads": mode})
    with pytest.raises(UserError, match=rf"gs://.*blocks_{mode}/train/000000\.npy: differs from its checksum"):
        [far.rows(step) for step in range(far.sequences_per_epoch // 32)]


def test_without_recorded_checksums_the_buckets_own_is_compared(proxy, emulator, local, tmp_path, caplog):
    target = upload(emulator, local, "own")
    proxy.fault = lambda path, span: "flipped" if content(path) and span and span.startswith("bytes=0-6") else None
    far = batches(f"{target}/3_build_nano_gpt.npy", tmp_path / "a")
    with pytest.raises(UserError, match=r"gpt\.npy: what came differs from the checksum that its server states"):
        far.rows(0)
    assert not caplog.text
    batches(target + "/*.npy", tmp_path / "b", data={"remote_reads": "ranged"})
    assert "read by ranges, which are not compared with checksums: `inspect --write-checksums`" in caplog.text


def test_a_damaged_copy_in_the_cache_is_fetched_again(proxy, emulator, local, tmp_path):
    target = upload(emulator, local, "copies")
    near, far = batches(local, tmp_path / "a"), batches(target, tmp_path / "b")
    expected = near.rows(0)
    np.testing.assert_array_equal(far.rows(0), expected)
    del far
    gc.collect()
    for path in (tmp_path / "b").iterdir():
        if path.name != ".lock":
            flip(path)
    cache._verified.clear()  # as in a new process
    far = batches(target, tmp_path / "b")
    for step in range(far.sequences_per_epoch // 32):
        np.testing.assert_array_equal(far.rows(step), near.rows(step))


def test_a_replaced_object_is_fetched_again(proxy, emulator, tmp_path):
    (folder := tmp_path / "shards").mkdir()
    for value in (1, 2):
        np.save(folder / "0.npy", np.full(1000, value, np.uint16))
        target = upload(emulator, folder, "replaced")
        assert batches(target, tmp_path / "cache").rows(0).max() == value


def test_from_the_web_with_and_without_ranges(local, tmp_path):
    near = batches(local, tmp_path / "a")
    for ranges in (True, False):
        with WebServer(local.parent, ranges) as server:
            far = batches(f"{server.address}/{local.name}", tmp_path / f"cache{ranges}")
            for step in (0, 1, 70):
                np.testing.assert_array_equal(far.rows(step), near.rows(step))
            one = f"{server.address}/{local.name}/3_build_nano_gpt.npy"
            ids = np.load(local / "3_build_nano_gpt.npy")
            dataset = open_shards(one, 1000, settings=DataConfig(remote_reads="ranged"))
            np.testing.assert_array_equal(dataset.gather(0, np.array([100, 7]), 9), [ids[100:109], ids[7:16]])


def test_a_server_that_keeps_failing_is_quoted(local, tmp_path, short_retries):
    with WebServer(local.parent) as server, FaultyProxy(server.address) as proxy:
        target = f"{proxy.address}/{local.name}/3_build_nano_gpt.npy"
        far = batches(target, tmp_path)
        for fault, words in {"503": "503", "429": "429"}.items():
            proxy.fault = lambda path, span, fault=fault: fault
            with pytest.raises(UserError, match=words) as error:
                batches(target, tmp_path / fault)
            assert "gave up after" in str(error.value)
        with pytest.raises(UserError, match="gave up after"):
            far.rows(0)
        proxy.fault = lambda path, span: None
        near = batches(local / "3_build_nano_gpt.npy", tmp_path)
        np.testing.assert_array_equal(batches(target, tmp_path).rows(0), near.rows(0))  # a new run begins anew


def test_from_s3(local, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    port = free_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    with process("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), port=port) as address:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": address})
        fs, _ = filesystem("s3://tokens")
        fs.mkdir("tokens")
        fs.put(str(local), "tokens/all", recursive=True)
        near = batches(local, tmp_path / "a")
        for mode in ("whole", "auto"):
            far = batches("s3://tokens/all", tmp_path / "b", data={"remote_reads": mode})
            np.testing.assert_array_equal(far.rows(0), near.rows(0))
        far = batches("s3://tokens/all/*.npy", tmp_path / "b", data={"remote_reads": "ranged"})
        np.testing.assert_array_equal(far.rows(0), batches(local / "*.npy", tmp_path / "a").rows(0))


def test_concurrently_keeps_order_and_stops_at_an_error():
    assert remote.concurrently(lambda n: n * n, range(100), 7) == [n * n for n in range(100)]
    begun = []

    def fail(number):
        begun.append(number)
        if number == 3:
            raise KeyError("three")
        time.sleep(0.01)

    with pytest.raises(KeyError, match="three"):
        remote.concurrently(fail, range(1000), 4)
    assert len(begun) < 20


def test_no_thread_outlives_its_loader(proxy, emulator, local, tmp_path):
    before = threading.enumerate()
    far = batches(upload(emulator, local, "threads"), tmp_path)
    far.rows(0)
    started = [thread for thread in threading.enumerate() if thread.name == "shard loader" and thread not in before]
    assert len(started) == 1
    del far
    gc.collect()
    limit = time.monotonic() + 10
    while started[0].is_alive():
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert shard_loader.PART_BYTES * shard_loader.PARTS_AT_A_TIME <= 2**26  # memory that a download takes


def test_text_from_a_bucket_outlives_transient_errors(proxy, emulator, tmp_path, short_retries):
    (folder := tmp_path / "text").mkdir()
    texts = [f"text number {number}" for number in range(500)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    (folder / "b.txt").write_text("the last one")
    target, kinds, met = upload(emulator, folder, "text"), itertools.cycle(["503", "broken", "short", "stall"]), {}
    source = open_source(target)
    proxy.fault = lambda path, span: None if (path, span) in met else met.setdefault((path, span), next(kinds))
    assert list(source.documents()) == [*texts, "the last one"]
    assert len(met) > 1
