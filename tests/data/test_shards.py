"""Formats are recognised: our shards and those of other programs are read, and broken ones are named."""

from __future__ import annotations

import gc
import hashlib
import pickle
import re
import struct
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_xla.config import DataConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset, open_shards
from pretrain_xla.data.formats import layout
from pretrain_xla.data.shards import ShardWriter, open_shard
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem
from pretrain_xla.storage.remote import concurrently
from tests.shard_writers import WRITERS, blocks, build_nano_gpt, litdata, llm_c, nano_gpt

LOCAL = filesystem(".")[0]


@pytest.fixture
def cached(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def whole(path, cache):
    """All ids of a shard, read through a dataset."""
    dataset = open_shards(str(path), 2**32, settings=cache)
    return dataset.gather(0, np.array([0]), dataset.shards[0].tokens)[0]


def refused(path, message, cache=None):
    with pytest.raises(UserError) as error:
        whole(path, cache)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
@given(ids=st.lists(st.integers(0, 2**16 - 1), min_size=70, max_size=200))
@settings(max_examples=12)
def test_shards_of_other_projects_are_read(name, ids, tmp_path_factory):
    ids = [50256, 7, *ids]  # nothing that looks like another format by chance
    folder = tmp_path_factory.mktemp("shards")
    WRITERS[name](folder / name, ids)
    assert whole(folder / name, DataConfig(cache_dir=str(folder / "cache"))).tolist() == ids


@pytest.mark.parametrize("format", ["npy", "bin", "parquet"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(data=st.data())
@settings(max_examples=12)
def test_what_we_write_is_read(format, dtype, data, tmp_path_factory):
    parts = data.draw(st.lists(st.lists(st.integers(0, min(np.iinfo(dtype).max, 2**31 - 1)), min_size=1), min_size=1))
    folder = tmp_path_factory.mktemp("ours")
    writer = ShardWriter(LOCAL, str(folder / "train"), np.dtype(dtype), 30, format)
    for part in parts:
        writer.append(np.array(part, dtype), documents=1)
    info = writer.close()
    ids = [token for part in parts for token in part]
    cache = DataConfig(cache_dir=str(folder / "cache"))
    read = [whole(folder / "train" / shard.name, cache).tolist() for shard in info.shards]
    assert [token for shard in read for token in shard] == ids
    assert [shard.sha256 for shard in info.shards] == [
        hashlib.sha256((folder / "train" / shard.name).read_bytes()).hexdigest() for shard in info.shards
    ]


def test_our_bin_is_that_of_other_projects(tmp_path):
    """Byte for byte, and any reader of Parquet reads ours."""
    ids = np.arange(5000, dtype=np.uint16)
    for format in ("bin", "parquet"):
        writer = ShardWriter(LOCAL, str(tmp_path), ids.dtype, 10**6, format)
        writer.append(ids, 1)
        writer.close()
    llm_c(tmp_path / "peer.bin", ids.tolist())
    assert (tmp_path / "000000.bin").read_bytes() == (tmp_path / "peer.bin").read_bytes()
    rows = pq.read_table(tmp_path / "000000.parquet")["input_ids"].to_pylist()
    assert [len(row) for row in rows] == [1024] * 4 + [904]
    assert [token for row in rows for token in row] == ids.tolist()


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_every_format_gives_the_same_batches(format, tmp_path, cached):
    """And each token is read once per epoch by any process: the order does not depend on the format."""
    lengths = (1300, 640, 700)
    for folder, writer in (("npy", build_nano_gpt), (format, WRITERS[format])):
        (tmp_path / folder).mkdir()
        for number, length in enumerate(lengths):
            ids = (np.arange(length) + 2000 * number).tolist()
            writer(tmp_path / folder / f"{number}.{format.rpartition('.')[2] if folder == format else 'npy'}", ids)
    made = [
        Batches(
            open_dataset(str(tmp_path / folder), 16, 50257, settings=cached),
            sequences_per_batch=10,
            seq_length=16,
            seed=7,
            shuffle_window=2,
        )
        for folder in ("npy", format)
    ]
    steps = -(-made[0].sequences_per_epoch // 10)
    for step in [*range(steps), 3, 100]:
        np.testing.assert_array_equal(made[1].rows(step), made[0].rows(step))
        np.testing.assert_array_equal(made[1].rows(step)[4:], made[1].rows(step, slice(4, None)))
    firsts = np.concatenate([made[1].rows(step)[:, 0] for step in range(steps)])[: made[1].sequences_per_epoch]
    expected = [2000 * n + 16 * j for n, length in enumerate(lengths) for j in range((length - 1) // 16)]
    assert sorted(firsts.tolist()) == expected


def test_order_and_fingerprint_never_change(tmp_path):
    """Golden values: if they change, runs cannot be resumed in their order."""
    for number, count in enumerate([5000, 3000, 9001, 2000, 7777]):
        np.save(tmp_path / f"{number:03d}.npy", (np.arange(count) * (number + 3) % 911).astype(np.uint16))
    dataset, seen = open_dataset(str(tmp_path), 16, 1000), hashlib.sha256()
    for drop_last in (False, True):
        for window in (1, 2, 8):
            settings = {"shuffle_window": window, "drop_last": drop_last}
            batches = Batches(dataset, sequences_per_batch=64, seq_length=16, seed=5, **settings)
            for step in range(60):
                seen.update(batches.rows(step).tobytes())
    assert (dataset.fingerprint, seen.hexdigest()[:16]) == ("138803c5bc642877", "838064af3f3d26f4")


def test_broken_bin_files_are_named(tmp_path):
    ids = list(range(2000))
    llm_c(path := tmp_path / "a.bin", ids)
    good = path.read_bytes()
    cases = {
        good[:-2]: "truncated: 5,022 bytes on disk where its header says 5,024",
        good + b"xx": "too long",
        good[:100]: "truncated",
        good[:6]: "truncated",
        struct.pack("<i", 20240521) + good[4:]: "magic number 20240521 is unknown",
        struct.pack(">i", 20240520) + good[4:]: "is unknown",
        good[:4] + struct.pack("<i", 2) + good[8:]: "version 2",
        good[:8] + struct.pack("<i", -5) + good[12:]: "-5 tokens",
        struct.pack("<i", 20240522) + good[4:]: "multiple-choice",
        good[1024:] + b"x": "odd length, 4,001 bytes",
        np.array(ids, np.uint32).tobytes()[:-2]: "7,998 bytes, where ids of 4 bytes are expected",
        b"lines of text, again and again\n" * 99: "text, not token ids: not a token shard",
        b"PK\3\4" + good: "a zip file, as torch.save and np.savez write: not a token shard",
        pickle.dumps({"model": "x" * 99}): "a pickle",
        b"\x1f\x8b\x08" + good: "compressed with gzip",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        refused(path, message)
    path.write_bytes(b"")
    assert open_shard(LOCAL, str(path)).tokens == 0


def text_like(dtype, vocab=50_257, count=3000):
    """Ids with a distribution like that of text."""
    return (vocab * np.random.default_rng(0).random(count) ** 4).astype(dtype)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.ds"])
def test_width_of_ids_without_a_header_is_recognised(tmp_path, dtype, name):
    """OLMo names such files .npy; its newer ones, and Llama 3's vocabulary, take 32 bits."""
    ids = text_like(dtype, 50_257 if dtype == "<u2" else 128_256)
    ids.tofile(tmp_path / name)
    assert whole(tmp_path / name, None).tolist() == ids.tolist()
    assert open_shard(LOCAL, str(tmp_path / name)).dtype == dtype


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<i4", "<i8", "<u8"])
def test_any_integers_of_npy_are_read_and_none_is_taken_for_another(tmp_path, dtype):
    ids = text_like(dtype, 100)
    np.save(tmp_path / "a.npy", ids)
    with fsspec.open(f"memory://{dtype.strip('<')}/a.npy", "wb") as file:
        np.save(file, ids)
    settings = DataConfig(remote_reads="ranged")
    for path in (str(tmp_path), f"memory://{dtype.strip('<')}"):
        dataset = open_dataset(path, 16, 100, settings=settings)
        assert dataset.gather(0, np.array([0]), 3000)[0].tolist() == ids.tolist()
    bad = {"u1": [200], "<i2": [-7], "<i4": [-7], "<i8": [-7, 2**32 + 5, 5 - 2**40], "<u8": [2**63, 2**32 + 5]}[dtype]
    for value in bad:
        ids[1500] = np.array(value).astype(dtype)
        np.save(tmp_path / "a.npy", ids)
        with pytest.raises(UserError, match=r"a\.npy: has "):
            open_dataset(str(tmp_path), 16, 100)
        with pytest.raises(UserError, match=r"a\.npy: has "):
            open_shards(str(tmp_path), 100).gather(0, np.array([1490]), 20)


def test_the_error_on_a_file_that_is_not_a_shard_does_not_suggest_a_larger_vocabulary(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(UserError) as error:
        open_dataset(str(tmp_path), 16, 50_257)
    assert "a.bin: has no header, and read as uint16 it has token id 655" in str(error.value)
    assert "set vocab_size" not in str(error.value)
    (tmp_path / "a.npy").write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(UserError, match=r"a\.npy: not a complete \.npy file"):
        open_shard(LOCAL, str(tmp_path / "a.npy"))
    (tmp_path / "a.npy").unlink()
    (tmp_path / "a.bin").unlink()
    for name, said in {"x.mds": "MosaicML", "x.jsonl": "text: `prepare`", "x.pt": "np.save", "x": "prepare a"}.items():
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=f"no token shards .* in it: .*{said}"):
            open_dataset(str(tmp_path), 16, 100)
        (tmp_path / name).unlink()


def test_chunks_of_litdata_are_read_as_their_index_says(tmp_path):
    ids = text_like(int).tolist()
    for types, code in (("no_header_tensor:18", "q"), ("no_header_tensor:20", "H"), ("no_header_numpy:6", "I")):
        litdata(tmp_path / "chunk-0-0.bin", ids, types, code)
        assert whole(tmp_path / "chunk-0-0.bin", None).tolist() == ids
        assert open_shard(LOCAL, str(tmp_path / "chunk-0-0.bin")).format == "litdata"
    litdata(tmp_path / "chunk-0-0.bin", ids, "jpeg")
    refused(tmp_path / "chunk-0-0.bin", "a chunk of litdata that holds jpeg, not plain token ids")
    litdata(tmp_path / "chunk-0-0.bin", ids)
    (tmp_path / "index.json").write_text(re.sub(r'"dim": \d+', '"dim": null', (tmp_path / "index.json").read_text()))
    refused(tmp_path / "chunk-0-0.bin", "does not have its number of ids (dim): write it with TokensLoader")
    (tmp_path / "index.json").unlink()
    refused(tmp_path / "chunk-0-0.bin", "a chunk of litdata without its index.json")


def test_broken_parquet_files_are_named(tmp_path, cached):
    blocks(path := tmp_path / "a.parquet", list(range(1000)))
    good = path.read_bytes()
    for content, message in {
        good[:-1]: "truncated",
        good[: len(good) // 2]: "truncated",
        b"x" * 1000: "not a Parquet file",
        good[:-200] + b"x" * 192 + good[-8:]: "footer is damaged",
        good[:-8] + struct.pack("<i", 10**9) + good[-4:]: "footer is damaged",
        good[:40] + b"x" * 400 + good[440:]: "damaged",
    }.items():
        path.write_bytes(content)
        refused(path, message, cached)
    for column, message in {
        "text": "no column 'input_ids' (it has text)",
        "ragged": "differ in length",
        "negative": "negative token id",
        "missing": "missing values",
        "floats": "not lists of integers",
        "flat": "not lists of integers",
        "holes": "differ in length",
    }.items():
        values = {
            "text": pa.array(["a", "b"]),
            "ragged": pa.array([[1, 2], [3, 4, 5]]),
            "negative": pa.array([[1, 2], [3, -100]]),
            "missing": pa.array([[1, 2], [3, None]]),
            "floats": pa.array([[1.0], [2.0]]),
            "flat": pa.array([1, 2]),
            "holes": pa.array([[1, 2], [], [3, 4]]),
        }[column]
        pq.write_table(pa.table({"text" if column == "text" else "input_ids": values}), path)
        refused(path, message, cached)


def test_parquet_without_statistics_or_in_other_types(tmp_path, cached):
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.uint32()), pa.list_(pa.uint16(), 50), pa.list_(pa.int32(), 50)):
        rows = pa.array([list(range(start, start + 50)) for start in range(0, 1000, 50)], kind)
        for statistics in (True, False):
            path = tmp_path / f"{kind}{statistics}.parquet".replace("/", "")
            pq.write_table(pa.table({"input_ids": rows}), path, write_statistics=statistics, row_group_size=7)
            assert whole(path, cached).tolist() == list(range(1000))


def test_ids_of_parquet_are_checked_at_start_and_when_read(tmp_path, cached):
    pq.write_table(table := pa.table({"input_ids": [[1, 2], [3, 99]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has token id 99, but vocab_size=99"):
        open_dataset(str(tmp_path), 1, 99, settings=cached)
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    dataset = open_dataset(str(tmp_path), 1, 99, settings=cached)
    with pytest.raises(UserError, match=r"a\.parquet: has token id 99, but vocab_size=99"):
        dataset.gather(0, np.array([2]), 2)


def test_training_and_validation_files_in_one_folder(tmp_path):
    for name in ("edufineweb_train_000001.npy", "edufineweb_val_000000.npy", "edufineweb_train_000002.npy"):
        build_nano_gpt(tmp_path / name, list(range(100)))

    def names(target, split):
        return [shard.name for shard in open_dataset(str(target), 8, 100, split=split).shards]

    train = ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    assert names(tmp_path, "train") == names(tmp_path / "*", "train") == names(tmp_path / "*_train_*", None) == train
    assert names(tmp_path, "valid") == names(tmp_path / "*_val_*", "valid") == ["edufineweb_val_000000.npy"]
    assert len(names(tmp_path, None)) == 3
    assert names(tmp_path / train[0], "train") == train[:1]
    # A name that says nothing beside names that do is in doubt, and doubt could put validation text into training.
    nano_gpt(tmp_path / "more.bin", list(range(100)))
    with pytest.raises(UserError, match=r"more\.bin: its name says neither training nor validation"):
        names(tmp_path, "train")
    with pytest.raises(UserError, match="no file matches this pattern"):
        names(tmp_path / "*.nothing", "train")
    (tmp_path / "only").mkdir()
    nano_gpt(tmp_path / "only" / "val.bin", list(range(100)))
    assert names(tmp_path / "only", "train") == ["val.bin"]


def test_special_characters_in_a_folders_name_and_linked_shards(tmp_path):
    (tmp_path / "data [v2]").mkdir()
    build_nano_gpt(tmp_path / "far.npy", list(range(100)))
    (tmp_path / "data [v2]" / "a_train_0.npy").symlink_to(tmp_path / "far.npy")
    for path in ("data [v2]", "data [v2]/*_train_*", "data [v2]/a_train_0.npy", "data*/*"):
        assert open_dataset(f"{tmp_path}/{path}", 8, 100).tokens == 100
    (tmp_path / "data [v2]" / "a_train_0.npy").unlink()
    (tmp_path / "data [v2]" / "a_train_0.npy").symlink_to(tmp_path / "none.npy")
    with pytest.raises(UserError, match=r"a_train_0\.npy: cannot be read: no such file"):
        open_dataset(f"{tmp_path}/data [v2]", 8, 100)


def test_real_shards_are_read_unchanged(shared):
    for name in ("openwebtext_val", "tinystories_val", "tinystories_test"):
        path = shared(f"text/en/{name}_gpt2_uint16.bin")
        dataset = open_dataset(str(path), 1024, 50257)
        tokens = np.fromfile(path, np.uint16)
        assert dataset.shards[0].format == "raw"
        np.testing.assert_array_equal(dataset.gather(0, np.array([0]), len(tokens))[0], tokens)


def test_headers_are_parsed_in_many_threads_at_once(tmp_path):
    """Python's parser of literals fails if the garbage collector runs in it and lets another thread parse."""

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            time.sleep(0)  # lets other threads run, as closing a file does

    def tokens(number):
        Garbage()
        return layout("0.npy", len(head), head).tokens

    np.save(tmp_path / "0.npy", np.arange(9, dtype=np.uint16))
    head = (tmp_path / "0.npy").read_bytes()
    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        found = concurrently(tokens, range(1000), 16)
    finally:
        gc.set_threshold(*before)
    assert set(found) == {9}
