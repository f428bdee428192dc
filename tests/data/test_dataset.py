from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.data import dataset as dataset_module
from pretrain_xla.data.checksums import verify_checksums, write_checksums
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.data.shards import open_shard, write_shard
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.prepare.inspect_command import inspect_command
from pretrain_xla.storage.files import filesystem, write_atomically
from pretrain_xla.text.sources import source_of

LOCAL = filesystem(".")[0]


class Stop(BaseException):
    """Such as KeyboardInterrupt."""


def ids(count, highest=100, dtype=np.uint16):
    return np.random.default_rng(count).integers(0, highest, count).astype(dtype)


def refused(message, *arguments):
    with pytest.raises(UserError) as error:
        open_dataset(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shard_is_what_numpy_writes_and_reads(tmp_path, dtype):
    tokens = ids(1000, dtype=dtype)
    info = write_shard(LOCAL, f"{tmp_path}/new/a.npy", tokens)
    np.save(tmp_path / "b.npy", tokens)
    assert (tmp_path / "new" / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "a.npy"), tokens)
    assert (info.name, info.tokens, info.max_id) == ("a.npy", 1000, tokens.max())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npy"]


@pytest.mark.parametrize(("fault", "raised"), [(OSError(28, "No space left on device"), UserError), (Stop(), Stop)])
def test_failed_write_keeps_the_previous_file(tmp_path, fault, raised):
    def parts():
        yield b"half"
        raise fault

    (tmp_path / "a").write_text("before")
    with pytest.raises(raised):
        write_atomically(LOCAL, f"{tmp_path}/a", parts())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


def test_shards_of_other_programs_need_no_manifest(write_shards):
    first, second = ids(50), ids(70)
    dataset = open_dataset(write_shards(first, second), 16, 100)
    assert (dataset.tokens, dataset.info, len(dataset.shards)) == (120, None, 2)
    np.testing.assert_array_equal(dataset.gather(1, np.array([60, 0]), 5), [second[60:65], second[:5]])


def test_shards_on_another_file_system():
    with fsspec.open("memory://far/0.npy", "wb") as file:
        np.save(file, ids(50))
    dataset = open_dataset("memory://far", 16, 100)
    np.testing.assert_array_equal(dataset.gather(0, np.array([3, 40]), 5), [ids(50)[3:8], ids(50)[40:45]])


def test_replaced_shard_is_not_taken_for_the_previous_one(tmp_path):
    folder = str(tmp_path)
    for highest in (100, 50):
        write_shard(LOCAL, f"{folder}/0.npy", ids(50, highest))
        np.testing.assert_array_equal(open_dataset(folder, 16, 100).gather(0, np.array([0]), 50)[0], ids(50, highest))


def test_missing_and_empty_folders(tmp_path):
    refused("no such folder of token shards", str(tmp_path / "none"), 16, 100)
    refused("no token shards", str(tmp_path), 16, 100)
    (tmp_path / "train").mkdir()
    refused(f"did you mean {tmp_path}/train?", f"{tmp_path}/", 16, 100)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (ids(50).astype(">u2"), "001.npy: holds >u2[50]"),
        (ids(50).astype(np.float32), "001.npy: holds float32[50]"),
        (ids(50).reshape(5, 10), "001.npy: holds uint16[5, 10]"),
        (ids(16), "001.npy: 16 tokens are too few for seq_length=16"),
        (np.array([1] * 50 + [100], np.uint16), "001.npy: has token id 100, but vocab_size=100"),
        (np.array([1] * 50 + [2**32 - 1], np.uint32), "001.npy: has numbers below 0 or over 2**31"),
    ],
)
def test_bad_shards_are_named(write_shards, tokens, message):
    refused(message, write_shards(ids(50), tokens), 16, 100)


@pytest.mark.parametrize("change", [-1, -60, -149, 1])
def test_wrong_size_on_disk(write_shards, tmp_path, change):
    folder = write_shards(ids(100))
    path = tmp_path / "shards" / "000.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"x")
    message = {-1: "000.npy: truncated: 327 bytes", -60: "000.npy: truncated", 1: "000.npy: too long"}
    refused(message.get(change, "000.npy: truncated"), folder, 16, 100)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, content, with_magic):
    path = tmp_path_factory.mktemp("any") / "a.npy"
    path.write_bytes((b"\x93NUMPY\x01\x00" if with_magic else b"") + content)
    with pytest.raises(UserError) as error:
        open_shard(LOCAL, str(path))
    assert "\n" not in str(error.value)


def test_ids_that_the_scan_at_start_skips_are_caught_when_read(write_shards, monkeypatch):
    tokens = ids(1000)
    tokens[500] = 999
    monkeypatch.setattr(dataset_module, "SCANNED_TOKENS", 100)
    dataset = open_dataset(write_shards(tokens), 16, 100)
    assert dataset.gather(0, np.array([0]), 400).shape == (1, 400)
    with pytest.raises(UserError, match=r"000\.npy: has token id 999"):
        dataset.gather(0, np.array([0, 490]), 17)
    for end in (0, -1):
        tokens[end] = 999
        refused("has token id 999", write_shards(tokens), 16, 100)
        tokens[end] = 0


def test_fingerprint_follows_content_and_not_the_place(write_shards):
    changed = ids(70)
    changed[-1] += 1
    prints = [
        open_dataset(write_shards(*shards, folder=f"f{number}"), 16, 200).fingerprint
        for number, shards in enumerate([(ids(50), ids(70)), (ids(50), ids(70)), (ids(50), changed), (ids(50),)])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.fixture
def prepared(tmp_path):
    documents = [f"document {number} " * 5 for number in range(200)]
    prepare(source_of("test", "1", lambda: documents), str(tmp_path / "d"), "bytes", valid_fraction=0.2)
    return tmp_path / "d"


def test_manifest_is_found_from_the_dataset_and_its_splits_only(prepared):
    (prepared / "other").mkdir()
    found = [dataset_info(str(prepared / name)) for name in (".", "train", "valid/", "other")]
    assert found[0] == found[1] == found[2] is not None
    assert found[3] is None
    assert dataset_info(str(prepared.parent / "none")) is None


def test_checksums_find_a_flipped_bit(prepared):
    verify_checksums(str(prepared / "train"))
    path = prepared / "valid" / "000000.npy"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"valid/000000.npy: differs from its checksum"):
        verify_checksums(str(prepared))
    path.unlink()
    with pytest.raises(UserError, match=r"valid/000000.npy: missing"):
        verify_checksums(str(prepared))


def test_manifest_and_folder_must_agree(prepared):
    train = prepared / "train"
    assert open_dataset(str(train), 16, 257).info is not None
    refused("has token id 256, but vocab_size=256", str(train), 16, 256)
    np.save(train / "stray.npy", ids(50))
    refused("stray.npy: not listed", str(train), 16, 257)
    (train / "stray.npy").rename(train / "000000.npy")
    refused("000000.npy: 50 tokens where dataset.json says", str(train), 16, 257)
    (train / "000000.npy").rename(train / "000001.npy")
    refused("000000.npy: missing", str(train), 16, 257)


def test_manifest_max_id_saves_the_scan(prepared, monkeypatch):
    monkeypatch.setattr(dataset_module, "_scan", None)
    assert open_dataset(str(prepared / "train"), 16, 257).tokens > 0


def test_damaged_manifest_is_one_line(prepared):
    tree = json.loads((prepared / "dataset.json").read_text())
    for damage in ("{", json.dumps({**tree, "version": 2}), json.dumps({**tree, "vocab_size": "many"})):
        (prepared / "dataset.json").write_text(damage)
        refused("dataset.json: damaged", str(prepared / "train"), 16, 257)


def test_a_manifest_that_is_still_valid_but_has_changed_is_refused(prepared):
    """By its own checksum, which does not depend on how it is written; without one, as in older datasets, it is accepted."""
    path, train = prepared / "dataset.json", str(prepared / "train")
    tree = json.loads(path.read_text())
    for key, value in (
        ("vocab_size", 258),
        ("end_of_text", 10),
        ("tokenizer_fingerprint", "0"),
        ("skipped_documents", 7),
    ):
        assert tree[key] != value
        path.write_text(json.dumps(tree | {key: value}))
        refused("dataset.json: differs from its own checksum: copy it again", train, 16, 257)
    older = {key: value for key, value in tree.items() if key != "checksum"}
    path.write_text(json.dumps(older | {"chfcksum": tree["checksum"]}))
    refused("dataset.json: damaged (unknown key 'chfcksum', and no checksum)", train, 16, 257)
    for same in (dict(reversed(tree.items())), older):
        path.write_text(json.dumps(same, separators=(",", ":")))
        info = open_dataset(train, 16, 257).info
        assert info is not None
        assert info.vocab_size == 257


def test_checksums_of_shards_of_other_programs(write_shards, tmp_path, capsys):
    """`inspect --write-checksums` records them; from then on a flipped bit is found when the shard is opened."""
    folder = write_shards(ids(500), ids(700))
    before = open_dataset(folder, 16, 100)
    with pytest.raises(UserError, match=r"no checksums\.json, so there are no checksums to compare with"):
        verify_checksums(folder)
    with pytest.raises(UserError, match=f"checksums are recorded for all shards of a folder: name {folder}"):
        inspect_command([f"{folder}/000.npy", "--write-checksums"])
    assert inspect_command([folder, "--write-checksums", "--tokenizer", "bytes"]) == 1  # no end-of-text in it
    assert f"checksums recorded in {folder}/checksums.json" in capsys.readouterr().out
    verify_checksums(folder)
    after = open_dataset(folder, 16, 100)
    assert after.listed["001.npy"].max_id == 99
    assert after.fingerprint == before.fingerprint
    assert after.gather(0, np.array([0]), 500).shape == (1, 500)
    assert open_dataset(f"{folder}/000.npy", 16, 100).fingerprint  # one of them is still found
    assert before.info is after.info is None
    path = tmp_path / "shards" / "000.npy"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    bad = open_dataset(folder, 16, 100)
    with pytest.raises(UserError, match=r"000\.npy: differs from its checksum"):
        bad.gather(0, np.array([0]), 9)
    with pytest.raises(UserError, match=r"000\.npy: differs from its checksum"):
        verify_checksums(folder)
    path.unlink()
    refused("000.npy: missing, though checksums.json lists it", folder, 16, 100)
    (tmp_path / "shards" / "checksums.json").write_text("{}")
    refused(
        "checksums.json: damaged (shards: Field required): run `inspect --write-checksums` again", folder, 16, 50257
    )


def test_an_older_dataset_gets_checksums_of_blocks(prepared):
    path = prepared / "dataset.json"
    new = path.read_text()
    tree = json.loads(new)
    del tree["checksum"]
    for split in tree["splits"].values():
        for shard in split["shards"]:
            del shard["crc32"]
    path.write_text(json.dumps(tree))
    shards = open_dataset(str(prepared / "train"), 16, 257).shards
    assert write_checksums(str(prepared / "train"), shards, {}) == f"{prepared}/dataset.json"
    assert path.read_text() == new


def test_interrupted_dataset_is_not_trained_on(prepared):
    (prepared / "dataset.json").rename(prepared / "dataset.json.partial")
    refused("its preparation was interrupted", str(prepared / "train"), 16, 257)


@pytest.mark.parametrize(
    ("asked", "meant"), [("test", "valid"), ("val", "valid"), ("training", "train"), ("trian", "train")]
)
def test_the_error_on_a_missing_split_names_the_existing_one(tmp_path, asked, meant):
    for split in ("train", "valid"):
        (tmp_path / "set" / split).mkdir(parents=True)
        np.save(tmp_path / "set" / split / "0.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(UserError) as caught:
        open_dataset(f"{tmp_path}/set/{asked}/", 10, 200)
    assert f"did you mean {tmp_path}/set/{meant}?" in str(caught.value)
    with pytest.raises(UserError, match="prepare` makes one"):
        open_dataset(f"{tmp_path}/nowhere/{asked}", 10, 200)
