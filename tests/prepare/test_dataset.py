from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.data.checksums import verify_checksums
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.sources import source_of
from pretrain_xla.text.split import LONG_DOCUMENT, split_document
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from tests.prepare.corpus import DOCUMENTS, source, tree
from tests.servers import Refusing


def documents_of(folder, split, tokenizer):
    """The documents that are in a split's shards, decoded."""
    tokens = np.concatenate([np.load(path) for path in sorted(Path(folder, split).iterdir())])
    assert tokens[-1] == tokenizer.end_of_text
    return [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)]


def test_every_document_is_there_once_and_ends_in_end_of_text(tmp_path):
    info = prepare(source(), str(tmp_path), "bytes", valid_fraction=0.1, shard_size=5000)
    tokenizer = load_tokenizer(info.tokenizer_name)
    train, valid = (documents_of(tmp_path, split, tokenizer)[:-1] for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(document + "<|endoftext|>" for document in DOCUMENTS)
    assert (info.splits["train"].documents, info.splits["valid"].documents) == (len(train), len(valid))
    assert 10 < len(valid) < 80
    assert (info.vocab_size, info.end_of_text, info.dtype) == (257, 256, "uint16")
    sizes = [shard.tokens for shard in info.splits["train"].shards]
    assert len(sizes) > 5
    assert set(sizes[:-1]) == {5000}
    assert 500 <= sizes[-1] <= 5500
    assert sum(sizes) == info.splits["train"].tokens == open_dataset(f"{tmp_path}/train", 64, 257).tokens
    verify_checksums(str(tmp_path))


def test_bytes_depend_on_the_recipe_alone(tmp_path, small_chunks, monkeypatch):
    recipe = {"train_vocab_size": 300, "shard_size": 3000}
    prepare(source(), str(tmp_path / "three"), num_workers=3, **recipe)
    prepare(source(), str(tmp_path / "one"), num_workers=1, **recipe)
    monkeypatch.undo()
    prepare(source(), str(tmp_path / "whole"), **recipe)
    assert tree(tmp_path / "one") == tree(tmp_path / "three") == tree(tmp_path / "whole")
    assert len(tree(tmp_path / "one")) > 5


def test_seed_holds_out_other_documents(tmp_path):
    valid = {}
    for seed in (0, 1):
        prepare(source(), str(tmp_path / str(seed)), "bytes", seed=seed)
        valid[seed] = set(documents_of(tmp_path / str(seed), "valid", load_tokenizer("bytes")))
    assert valid[0] != valid[1]


def test_dataset_with_a_trained_tokenizer_can_be_moved(tmp_path):
    info = prepare(source(), str(tmp_path / "a"), train_vocab_size=300, valid_fraction=0.2)
    before = open_dataset(f"{tmp_path}/a/valid", 16, 300)
    (tmp_path / "a").rename(tmp_path / "moved")
    after = open_dataset(f"{tmp_path}/moved/valid", 16, 300)
    assert before.fingerprint == after.fingerprint
    tokenizer = load_tokenizer(after.info.tokenizer_name)
    assert tokenizer.vocab_size == info.vocab_size == 300
    assert set(documents_of(tmp_path / "moved", "valid", tokenizer)[:-1]) < {d + "<|endoftext|>" for d in DOCUMENTS}


def test_tokenizer_file_is_copied_and_known_by_content(tmp_path):
    first = prepare(source(), str(tmp_path / "a"), train_vocab_size=300)
    second = prepare(source(), str(tmp_path / "b"), first.tokenizer_name)
    assert second.tokenizer_name == f"{tmp_path}/b/tokenizer/tokenizer.json"
    (tmp_path / "a").rename(tmp_path / "c")
    assert prepare(source(), str(tmp_path / "b"), str(tmp_path / "c" / "tokenizer")) == second
    assert second.splits == first.splits


def test_split_never_moves_when_documents_are_added_or_reordered(tmp_path):
    def valid(documents, name):
        prepare(source(documents), str(tmp_path / name), "bytes", valid_fraction=0.1)
        return set(documents_of(tmp_path / name, "valid", load_tokenizer("bytes"))[:-1])

    some, more = valid(DOCUMENTS[:200], "some"), valid(DOCUMENTS[::-1], "more")
    assert some < more
    assert not {document.removesuffix("<|endoftext|>") for document in more - some} & set(DOCUMENTS[:200])


def test_split_is_fixed_for_ever():
    """Golden values: should they change, what was held out would be trained on when a dataset is made again."""
    held_out = [number for number in range(100) if next(split_document(f"document {number}", 0.1))[0] == "valid"]
    assert held_out == [40, 44, 59, 70, 81]


@given(st.lists(st.integers(0, 30_000), max_size=12), st.floats(0.01, 0.99))
def test_long_document_loses_nothing(lengths, fraction):
    document = "\n\n".join(f"{number}" + "x y " * (length // 4) for number, length in enumerate(lengths))
    parts = list(split_document(document, fraction))
    assert "".join(text for _, text in parts) == document
    assert len(parts) == 1 or len(document) > LONG_DOCUMENT
    assert all(left[0] != right[0] for left, right in itertools.pairwise(parts))


def test_one_big_file_can_be_held_out_from(tmp_path, shared):
    info = prepare(str(shared("text/en/tinyshakespeare.txt")), str(tmp_path), "bytes", valid_fraction=0.1)
    share = info.splits["valid"].tokens / sum(split.tokens for split in info.splits.values())
    assert 0.04 < share < 0.2
    assert sum(split.tokens - split.documents for split in info.splits.values()) == pytest.approx(1_115_394, abs=4)


def test_same_recipe_returns_what_is_there(tmp_path):
    first = prepare(source(), str(tmp_path), "bytes")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    unread = source_of("another name", "1", lambda: pytest.fail("the source was read again"))
    assert prepare(unread, str(tmp_path), "bytes") == first
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_another_recipe_is_refused_and_overwrites_when_told(tmp_path):
    prepare(source(), str(tmp_path), "bytes", shard_size=3000)
    before = tree(tmp_path)
    for arguments, message in [
        ({"source": source(version="2")}, "source_version '1' → '2'"),
        ({"shard_size": 9000}, "shard_size 3000 → 9000"),
        ({"valid_fraction": 0.5}, "valid_fraction 0.05 → 0.5"),
        ({"tokenizer": None, "train_vocab_size": 300}, "tokenizer 'bytes' → 'bpe of 300 ids'"),
    ]:
        with pytest.raises(UserError) as error:
            prepare(
                **{
                    "source": source(),
                    "output_dir": str(tmp_path),
                    "tokenizer": "bytes",
                    "shard_size": 3000,
                    **arguments,
                }
            )
        assert message in str(error.value)
        assert "--overwrite" in str(error.value)
    assert tree(tmp_path) == before
    prepare(source(), str(tmp_path), "bytes", shard_size=9000, overwrite=True)
    prepare(source(), str(tmp_path / "fresh"), "bytes", shard_size=9000)
    assert {k: v for k, v in tree(tmp_path).items() if "fresh" not in k} == tree(tmp_path / "fresh")


def test_damaged_dataset_of_the_same_recipe_is_made_again(tmp_path):
    prepare(source(), str(tmp_path), "bytes")
    before = tree(tmp_path)
    os.truncate(tmp_path / "train" / "000000.npy", 500)
    prepare(source(), str(tmp_path), "bytes")
    assert tree(tmp_path) == before


def test_shards_of_others_are_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "mine.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"train/mine.npy: not written by `prepare`"):
        prepare(source(), str(tmp_path), "bytes")
    assert list(tree(tmp_path)) == ["train/mine.npy"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("given", ["mine/tokenizer", "mine/tokenizer/tokenizer.json", "link"])
def test_tokenizer_in_the_place_of_the_copy_is_refused_and_stays(tmp_path, given, overwrite):
    train_tokenizer(DOCUMENTS, 300, str(tmp_path / "mine" / "tokenizer"))
    (tmp_path / "link").symlink_to(tmp_path / "mine" / "tokenizer")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"(lies where the dataset keeps its own copy|not written by `prepare`)"):
        prepare(source(["one document"]), str(tmp_path / "mine"), str(tmp_path / given), overwrite=overwrite)
    assert tree(tmp_path) == before


def test_tokenizer_of_others_is_not_touched(tmp_path):
    train_tokenizer(DOCUMENTS, 300, str(tmp_path / "tokenizer"))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer/tokenizer.json: not written by `prepare`"):
        prepare(source(["one document"]), str(tmp_path), "bytes")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid_fraction": 0.0}, "valid_fraction=0.0"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"train_vocab_size": 300}, "give one of them"),
        ({"tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"tokenizer": None, "train_vocab_size": 100}, "too small"),
        ({"source": "no/such/file"}, "no such file"),
        (
            {"source": source(["one document"])},
            "a single document, and valid got nothing of it: a document of over 100,000",
        ),
        ({"source": source(["one document"]), "valid_fraction": 0.999999}, "and train got nothing of it"),
        ({"source": source(["one", "two"]), "valid_fraction": 0.000001}, "leaves nothing for valid out of 2 documents"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_shard(tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        prepare(**{"source": source(), "output_dir": str(tmp_path), "tokenizer": "bytes", **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out.*cannot be written"):
        prepare(source(), str(tmp_path / "file" / "out"), "bytes")


@pytest.mark.parametrize("status", [400, 403, 412])
def test_bucket_that_refuses_a_write_is_one_line(tmp_path, monkeypatch, status):
    with Refusing(status) as server:
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": server.address})
        with pytest.raises(UserError) as error:
            prepare(source(), f"gs://refusing-{status}/out", "bytes")
    assert f"gs://refusing-{status}/out/dataset.json.partial: cannot be written" in str(error.value)
    assert "check the credentials" in str(error.value)
    assert "space" not in str(error.value)
    assert "\n" not in str(error.value)


def test_progress_without_a_terminal_is_a_line_a_minute(tmp_path, monkeypatch, capsys, small_chunks):
    monkeypatch.setattr("pretrain_xla.prepare.progress.LINE_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    prepare(source(), str(tmp_path / "a"), "bytes", num_workers=1, progress=False)
    assert capsys.readouterr().err == ""
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "b"), "bytes", num_workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 58
    assert lines[-1].startswith("400 documents, ")
    assert lines[-1].endswith("M tokens/s, 100.0%")
    monkeypatch.undo()
    prepare(source(), str(tmp_path / "c"), "bytes", num_workers=1)
    assert capsys.readouterr().err == ""


def test_any_fsspec_url():
    info = prepare(source(), "memory://prepared", train_vocab_size=300, valid_fraction=0.2)
    assert info.tokenizer_name.startswith("memory://")
    assert load_tokenizer(info.tokenizer_name).vocab_size == 300
    assert prepare(source(), "memory://prepared", train_vocab_size=300, valid_fraction=0.2) == info
    assert open_dataset("memory://prepared/train", 16, 300).tokens == info.splits["train"].tokens
    verify_checksums("memory://prepared")
    assert not fsspec.filesystem("memory").exists("/prepared/dataset.json.partial")


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_is_the_default_and_wide_vocabularies_take_four_bytes(tmp_path):
    gpt2 = prepare(source(), str(tmp_path / "gpt2"))
    assert (gpt2.tokenizer_name, gpt2.vocab_size, gpt2.dtype) == ("gpt2", 50257, "uint16")
    wide = prepare(source(), str(tmp_path / "wide"), "cl100k_base")
    assert (wide.dtype, np.load(tmp_path / "wide" / "train" / "000000.npy").dtype) == ("uint32", np.uint32)
    assert json.loads((tmp_path / "wide" / "dataset.json").read_text())["tokenizer"] == "cl100k_base"
