from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import aiohttp
import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.documents import Document, read_documents
from pretrain_xla.text.hub import _batches as hub_batches
from pretrain_xla.text.source import Source
from pretrain_xla.text.sources import join_sources, open_source, source_of

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"text {number} " + "日本 and more " * (number % 5) for number in range(2500)]


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=300)


def write_stream(path, texts):
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)


def write_arrow_file(path, texts):
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)


def write_lines(opener):
    def write(path, texts):
        with opener(path, "wb") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())

    return write


def write_text(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts))


WRITERS = {
    "a.parquet": write_parquet,
    "a.arrow": write_stream,
    "b.arrow": write_arrow_file,
    "a.txt": write_text,
    "a.jsonl": write_lines(open),
    "a.jsonl.gz": write_lines(gzip.open),
    "a.jsonl.bz2": write_lines(bz2.open),
    "a.jsonl.xz": write_lines(lzma.open),
    "a.jsonl.zst": write_lines(zstandard.open),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder with the layout of a dataset repository on the Hub, which `datasets` reads in the same way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    configs = [
        {"config_name": "all", "data_files": [{"split": "train", "path": "*.parquet"}]},
        {"config_name": "one", "data_files": [{"split": "test", "path": "00.parquet"}]},
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for number in range(3):
        write_parquet(folder / f"{number:02d}.parquet", TEXTS[number * 800 : (number + 1) * 800])
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_and_every_place_in_it(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    found = list(read_documents(str(tmp_path / name)))
    assert [document.text for document in found] == TEXTS
    shares = [document.share for document in found]
    assert shares == sorted(shares)
    assert shares[-1] == (0.0 if name.endswith("arrow") else 1.0)
    for stop in (0, 1, 399, 400, 1023, 1024, 1500, 2498):
        place = json.loads(json.dumps(found[stop].place))
        rest = read_documents(str(tmp_path / name), place=place)
        assert [document.text for document in rest] == TEXTS[stop + 1 :]


def test_pattern_takes_matching_files_in_order_of_name(tmp_path):
    for name, text in [("b-2.txt", "two"), ("b-1.txt", "one"), ("a.txt", "no"), ("sub/b-3.txt", "three")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(open_source(f"{tmp_path}/b-*.txt").documents()) == ["one", "two"]
    assert list(open_source(f"{tmp_path}/**/b-*.txt").documents()) == ["one", "two", "three"]
    with pytest.raises(UserError, match="no file matches this pattern"):
        open_source(f"{tmp_path}/c*")


def test_pattern_at_a_url():
    with fsspec.open("memory://patterned/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write(b'{"text": "far away"}\n')
    assert list(open_source("memory://patterned/*.gz").documents()) == ["far away"]


def test_place_in_many_files(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("\n<|endoftext|>\n".join(TEXTS[number * 3 : number * 3 + 3]))
    found = list(read_documents(str(tmp_path)))
    for stop in range(12):
        rest = read_documents(str(tmp_path), place=found[stop].place)
        assert [document.text for document in rest] == TEXTS[stop + 1 : 12]


@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_by_name_config_and_split(hub, streaming):
    source = open_source(f"hf:{hub}:all", streaming=streaming)
    found = list(source.read(None))
    assert [document.text for document in found] == TEXTS[:2400]
    for stop in (0, 299, 300, 799, 800, 1023, 1024, 1600, 2398):
        place = json.loads(json.dumps(found[stop].place))
        assert [document.text for document in source.read(place)] == TEXTS[stop + 1 : 2400]
    assert list(open_source(f"hf:{hub}:one:test", streaming=streaming).documents()) == TEXTS[:800]


def test_streamed_and_downloaded_are_the_same_source(hub, tmp_path):
    streamed = open_source(f"hf:{hub}:all", streaming=True)
    info = prepare(streamed, str(tmp_path / "out"), "bytes")
    assert prepare(open_source(f"hf:{hub}:all"), str(tmp_path / "out"), "bytes") == info
    assert info.splits["train"].documents + info.splits["valid"].documents == 2400
    write_parquet(hub / "03.parquet", ["one more"])
    changed = open_source(f"hf:{hub}:all")
    assert changed.version != streamed.version
    assert list(changed.documents())[2400:] == ["one more"]


@pytest.mark.parametrize("streaming", [True, False])
def test_streaming_can_be_resumed_from_a_download_and_the_reverse(hub, streaming):
    begun, other = (open_source(f"hf:{hub}:all", streaming=way) for way in (streaming, not streaming))
    found = list(begun.read(None))
    for stop in (0, 799, 1023, 1024, 2100, 2399):
        rest = list(other.read(json.loads(json.dumps(found[stop].place))))
        assert [document.text for document in rest] == TEXTS[stop + 1 : 2400]
        if stop == 1024:  # and back again
            place = json.loads(json.dumps(rest[70].place))
            assert [document.text for document in begun.read(place)] == TEXTS[stop + 72 : 2400]


@pytest.mark.parametrize("streaming", [True, False])
def test_errors_of_datasets_are_one_line(hub, streaming):
    cases = {
        f"hf:{hub}:none": "BuilderConfig 'none' not found. Available: ['all', 'one']",
        f"hf:{hub}:all:valid": "alid",
        f"hf:{hub / 'nothing'}": "nothing",
        "hf:": "write hf:DATASET",
        "hf:a:b:c:d": "write hf:DATASET",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            next(open_source(name, streaming=streaming).read(None))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no column 'body' among id, text: name one with --text-column"):
        next(open_source(f"hf:{hub}:all", streaming=streaming, text_column="body").read(None))


def test_damaged_file_of_a_dataset_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(UserError, match=r"generating the dataset \(.*JSON parse error"):
        list(open_source(f"hf:{tmp_path}/data", cache_dir=str(tmp_path / "cache")).documents())


def test_stream_that_fails_with_an_error_of_any_library_is_one_line():
    class Broken:
        def iter(self, rows):
            yield [1]
            raise aiohttp.ClientPayloadError("cut off")

    batches = hub_batches("hf:a", Broken())
    assert next(batches) == [1]
    with pytest.raises(
        UserError, match=r"source 'hf:a': reading was interrupted \(cut off\): run the same command again"
    ):
        next(batches)


def test_text_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "two"], column="body")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n')
    assert list(open_source(str(tmp_path), text_column="body").documents()) == ["one", "two", "three"]
    for name, column, message in [
        ("a.parquet", "text", "no column 'text' among id, body: name one with --text-column"),
        ("a.parquet", "id", "column 'id' holds int64, not text"),
        ("b.jsonl", "text", "no key 'text': its keys are 'body'; name the right one with --text-column"),
    ]:
        with pytest.raises(UserError) as error:
            list(open_source(str(tmp_path / name), text_column=column).documents())
        assert message in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow", "a.jsonl.zst", "a.jsonl.gz", "a.jsonl.xz"])
def test_truncated_file_is_one_line(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        list(open_source(str(tmp_path / name)).documents())
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [write_stream, write_arrow_file])
def test_arrow_without_rows_is_one_line(tmp_path, write):
    write(tmp_path / "a.arrow", pa.array([], pa.string()))
    with pytest.raises(UserError, match="contains no text"):
        list(open_source(str(tmp_path / "a.arrow")).documents())


def text_source(name, lengths):
    return source_of(
        name, name, lambda: [f"{name}{number}".ljust(length, ".") for number, length in enumerate(lengths)]
    )


@given(
    lengths=st.lists(st.lists(st.integers(8, 40), min_size=1, max_size=30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4) | st.none(),
    max_documents=st.integers(1, 50) | st.none(),
)
def test_joined_sources_resume_from_any_place(lengths, weights, max_documents):
    sources = [text_source("abcd"[number], part) for number, part in enumerate(lengths)]
    joined = join_sources(sources, weights[: len(sources)] if weights else (), max_documents)
    found = list(joined.read(None))
    assert found == list(joined.read(None))
    for stop, document in enumerate(found):
        assert [after.text for after in joined.read(json.loads(json.dumps(document.place)))] == [
            after.text for after in found[stop + 1 :]
        ]
    if not weights:
        everything = itertools.chain.from_iterable(source.documents() for source in sources)
        assert [document.text for document in found] == list(everything)[:max_documents]


def test_weights_hold_at_every_point_until_one_source_ends():
    sources = [text_source("a", [30] * 1000), text_source("b", [10] * 1000)]
    taken = {"a": 0, "b": 0}
    for number, document in enumerate(join_sources(sources, [3, 1]).read(None)):
        taken[document.text[0]] += len(document.text)
        assert number < 20 or abs(taken["a"] / sum(taken.values()) - 0.75) < 0.1
    assert taken == {"a": 30_000, "b": 10_000}


def test_joining_is_part_of_the_version():
    one, two = text_source("a", [9]), text_source("b", [9])
    versions = [
        join_sources(*arguments).version
        for arguments in [
            ([one],),
            ([one, two],),
            ([two, one],),
            ([one, two], [1, 2]),
            ([one, two], [2, 1]),
            ([one], (), 5),
        ]
    ]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize(("weights", "message"), [([1], "one over 0 for each of the 2"), ([1, 0], "one over 0")])
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        join_sources([text_source("a", [9]), text_source("b", [9])], weights)


def test_interrupted_stream_says_that_it_can_be_resumed(tmp_path):
    def read(place):
        yield Document("one", 1)
        raise UserError("reading was interrupted: run the same command again to go on")

    with pytest.raises(UserError, match="to go on"):
        prepare(Source("test", "1", read), str(tmp_path / "out"), "bytes")


def test_prepare_command_with_several_sources_and_flags(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    command = [sys.executable, "-m", "pretrain_xla", "prepare"]
    words = ["--tokenizer", "bytes", "--weights", "2:1", "--max-documents", "900", "--valid-fraction", "0.1"]

    def run(*arguments):
        return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)

    ended = run(tmp_path / "a.parquet", tmp_path / "b.txt", tmp_path / "out", *words)
    assert ended.returncode == 0, ended.stderr
    assert "--train-dir" in ended.stdout
    assert open_dataset(str(tmp_path / "out" / "train"), 64, 257).tokens > 10_000
    for arguments, message in [
        ((tmp_path / "out",), "at least one source"),
        ((tmp_path, "b", "--weights", "x"), "--weights x"),
    ]:
        fault = run(*arguments)
        assert (fault.returncode, fault.stderr.count("\n")) == (2, 1)
        assert message in fault.stderr


def test_fineweb_script_without_a_network_is_one_line(tmp_path):
    command = [sys.executable, "scripts/prepare_fineweb.py", "--fineweb-edu", "--streaming", "--tokenizer", "bytes"]
    words = [
        "--overwrite",
        "--seed",
        "7",
        "--shard-size",
        "1000",
        "--output-dir",
        str(tmp_path / "out"),
        "--num-workers",
        "1",
    ]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [*command, *words, "--cache-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "hf:HuggingFaceFW/fineweb-edu:sample-10BT" in ended.stderr
    assert not (tmp_path / "out").exists()
