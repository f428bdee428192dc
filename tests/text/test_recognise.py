"""Files of a folder are recognised by their content; those that are not data are left out, and the log says so."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import os
import tarfile
import zipfile

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_xla.errors import UserError
from pretrain_xla.text.documents import files_version, open_text, read_documents
from pretrain_xla.text.reading import Reading
from pretrain_xla.text.sources import open_source


def texts(path, **options):
    return list(open_source(str(path), **options).documents())


def jsonl(*values, key="text"):
    return "".join(json.dumps({"id": 1, key: value}) + "\n" for value in values)


def parquet(*values, column="text"):
    file = io.BytesIO()
    pq.write_table(pa.table({column: [*values]}), file)
    return file.getvalue()


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def named(value):
    """A test's name, without the bytes, which hold the time of compression."""
    return value if isinstance(value, str) and value.isprintable() else "content"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wiki_00", jsonl("one", "two")),
        ("wiki_00", "\ufeff\n" + jsonl("one", "two")),
        ("a.txt", jsonl("one", "two")),
        ("A.JSONL", jsonl("one", "two")),
        ("A.JSONL.GZ", gzip.compress(jsonl("one", "two").encode())),
        ("wiki_00.bz2", bz2.compress(jsonl("one", "two").encode())),
        ("part-00000", gzip.compress(jsonl("one", "two").encode())),
        ("a.jsonl", gzip.compress(jsonl("one", "two").encode())),
        ("RC_2019-01.zst", zstandard.compress(jsonl("one", "two").encode())),
        ("part-00000", parquet("one", "two")),
        ("A.PARQUET", parquet("one", "two")),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2)),
        ("a.json", '{\n"text": "one"}\n{"text":\n"two"}'),
        ("a.json", '{"text": "one"}\n{"text": "two"}'),
        ("a.json.bz2", bz2.compress(json.dumps([{"text": "one"}, {"text": "two"}]).encode())),
        ("a.csv", "id,text\n1,one\n2,two\n"),
        ("a.csv", "text;id\none;1\ntwo;1\n"),
        ("A.CSV.gz", gzip.compress(b"\xef\xbb\xbftext\r\none\r\n\r\ntwo\r\n")),
        ("a.csv", "id,text\r1,one\r2,two\r"),
        ("a.tsv", 'id\ttext\n1\t"one"\n2\ttwo\n'),
    ],
    ids=named,
)
def test_files_are_read_by_their_content(tmp_path, name, content):
    write(tmp_path, **{name: content})
    assert texts(tmp_path / name) == texts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", '{"text": 1\n'),
        ("a.tex", "{\\em one}\n"),
        ("a.txt", '{"id": 1}\nand so on'),
        ("a.md", "[\n1]"),
        ("a.py", "{}\n"),
        ("a.dat", "id,text\n1,one\n"),
    ],
    ids=named,
)
def test_text_stays_text(tmp_path, name, content):
    write(tmp_path, **{name: content})
    assert texts(tmp_path / name) == [content.strip("\n")]
    assert open_text(str(tmp_path / name)).files[0].usual == "text"


def test_cells_keep_line_ends_quotes_and_length(tmp_path):
    values = ['a "quoted"\nline', "b\r\nc", "x" * 200_000, ",", ""]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *enumerate(values)])
        assert texts(tmp_path / name) == values[:-1]


def test_long_json_list_is_read_a_value_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_xla.text.readers.json_records._BLOCK", 100)
    values = [f"{number} " * (number % 90) + 'x\\"\u00e9' for number in range(200)]
    write(tmp_path, **{"a.json": json.dumps([{"text": value} for value in values])})
    assert texts(tmp_path / "a.json") == values


def test_keys_within_keys(tmp_path):
    rows = [{"data": {"text": "one"}}, {"data": {"text": None}}, {"data": None}, {"data": {"text": "two"}}]
    write(tmp_path / "lines", **{"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    (tmp_path / "columns").mkdir()
    pq.write_table(table := pa.table({"data": [row["data"] for row in rows]}), tmp_path / "columns" / "a.parquet")
    with pa.OSFile(str(tmp_path / "columns" / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "lines", text_column="data.text") == ["one", "two"]
    assert texts(tmp_path / "columns", text_column="data.text") == ["one", "two"] * 2
    for streaming in (False, True):
        source = open_source(
            f"hf:{tmp_path / 'lines'}", text_column="data.text", streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        assert list(source.documents()) == ["one", "two"]
    write(
        tmp_path / "flat", **{"a.jsonl": jsonl("one", key="data.text"), "b.parquet": parquet("two", column="data.text")}
    )
    assert texts(tmp_path / "flat", text_column="data.text") == ["one", "two"]
    with pytest.raises(UserError, match=r"no field 'body' of 'data.body' among text: name one"):
        texts(tmp_path / "columns", text_column="data.body")
    with pytest.raises(UserError, match=r"a.jsonl:1: no key 'data.body': its keys are 'data'"):
        texts(tmp_path / "lines", text_column="data.body")


def test_null_is_not_a_document_in_parquet_and_json_lines(tmp_path):
    write(tmp_path, **{"a.parquet": parquet("one", None, "", "two"), "b.jsonl": jsonl("one", None, "", "two")})
    assert texts(tmp_path) == ["one", "two"] * 2


def test_one_document_per_line(tmp_path):
    write(tmp_path, **{"a.txt": "one\n\n<|endoftext|>\r\ntwo"})
    assert texts(tmp_path / "a.txt", document_per_line=True) == ["one", "<|endoftext|>", "two"]


def test_snapshot_of_a_dataset_is_its_training_data(tmp_path, caplog):
    """README, LICENSE, metadata and test splits next to Parquet are left out."""
    write(
        tmp_path,
        **{
            "README.md": "---\nlicense: mit\n---\nA card.",
            "LICENSE": "MIT",
            "dataset_infos.json": '{"default": {"features": {}}}\n',
            "loader.py": "import datasets\n",
            "data__train-00000-of-00001.parquet": parquet("one"),
            "data__test-00000-of-00001.parquet": parquet("held out"),
            "data__validation-00000-of-00001.parquet": parquet("held out"),
            "more.jsonl": jsonl("two"),
        },
    )
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["one", "two"]
    assert "6 of 8 files left out: " in caplog.text
    assert "about the data: LICENSE, README.md" in caplog.text
    assert "held out, by its name: data/test-00000-of-00001.parquet, data/validation-00000" in caplog.text
    assert "no such key or column in it: dataset_infos.json" in caplog.text
    assert "not records, in a dataset of the Hub: loader.py" in caplog.text
    assert texts(tmp_path / "data" / "test*") == ["held out"]  # by its name it can be had


def test_splits_of_text_and_files_that_only_look_like_splits(tmp_path):
    write(tmp_path / "a", **{"wiki.train.raw": "one", "wiki.valid.raw": "no", "wiki.test.raw": "no"})
    write(tmp_path / "b", **{"train.py": "one", "test.py": "two", "README.md": "three", "LICENSE": "four"})
    write(tmp_path / "c", **{"test.jsonl": jsonl("one")})
    assert texts(tmp_path / "a") == ["one"]
    assert texts(tmp_path / "b") == ["four", "three", "two", "one"]
    assert texts(tmp_path / "c") == ["one"]


def test_folder_written_by_save_to_disk(tmp_path):
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    ).save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved", **{"train__cache-0123456789abcdef.arrow": b"a cache"})
    assert texts(tmp_path / "saved") == ["train"]
    assert texts(tmp_path / "saved" / "test") == ["test"]
    with pytest.raises(UserError, match="a folder written by `save_to_disk`: give it without hf:"):
        open_source(f"hf:{tmp_path}/saved/test")


def tar_of(files, compression=""):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


MEMBERS = {
    "../../escaped.txt": b"one",
    "a/b.jsonl.gz": gzip.compress(jsonl("two", "three").encode()),
    "a/LICENSE": b"MIT",
    "a/c.png": b"\x89PNG\0",
    "a/d.json": b'{"id": 1}',
    "a/inner.xz": tar_of({"/etc/passwd.txt": b"four"}, "xz"),  # as OpenWebText is packed
    "wiki_00": jsonl("five").encode(),
}


SEEDS = [
    *(tar_of(MEMBERS), tar_of(MEMBERS, "gz"), zip_of(MEMBERS), gzip.compress(b"one"), zstandard.compress(b"one" * 99)),
    *(b'[{"text": "one"}, {"text": "two"}]', jsonl("one", None, "two").encode(), b'id,text\n1,"one\n"\n2,two\n'),
    *(parquet("one", "two"), b"ARROW1" + bytes(60)),
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", tar_of(MEMBERS)),
        ("a.tgz", tar_of(MEMBERS, "gz")),
        ("a.tar.xz", tar_of(MEMBERS, "xz")),
        ("a.tar.zst", zstandard.compress(tar_of(MEMBERS))),
        ("a.zip", zip_of(MEMBERS)),
    ],
    ids=named,
)
def test_members_of_archives_are_read_without_unpacking(tmp_path, name, content, caplog):
    write(tmp_path / "x", **{name: content})
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "x" / name))
    found = list(source.read(None))
    assert [document.text for document in found] == ["one", "two", "three", "four", "five"]
    assert sorted(tmp_path.rglob("*")) == before
    assert "members left out: 1 (about the data, or hidden), 1 (not text," in caplog.text
    assert [document.text for document in source.read(found[1].place)] == ["three", "four", "five"]
    end = -(-len(content.rstrip(b"\0")) // 512) * 512 if name == "a.tar" else len(content) - 5
    for kept in (len(content) // 2, end):  # of the tar, exactly its last member's end
        (tmp_path / "x" / name).write_bytes(content[:kept])
        with pytest.raises(UserError) as error:
            texts(tmp_path / "x" / name)
        assert f"{name}" in str(error.value)
        assert "\n" not in str(error.value)


def test_errors_name_the_member(tmp_path):
    write(tmp_path, **{"a.zip": zip_of({"x.jsonl": b"{oops\n"}), "b.tar": tar_of({"y.txt": b"x" * 9000 + b"\xff"})})
    with pytest.raises(UserError, match=r"a\.zip::x\.jsonl:1: not JSON"):
        texts(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"b\.tar::y\.txt: not UTF-8 text \(byte 0xff\)"):
        texts(tmp_path / "b.tar")
    member = tarfile.TarInfo("n")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**33
    write(tmp_path, **{"d.tar": member.tobuf(tarfile.GNU_FORMAT) + b"n" * 9000})
    with pytest.raises(UserError, match=r"d\.tar: damaged \(a name of 8,589,934,592 bytes\)"):
        texts(tmp_path / "d.tar")
    nested = tar_of({"deep.txt": b"one"})
    for _ in range(3):
        nested = tar_of({"in.tar": nested})
    write(tmp_path, **{"c.tar": nested})
    with pytest.raises(UserError, match="contains no text"):
        texts(tmp_path / "c.tar")


def test_version_is_unchanged_if_files_are_what_their_names_say(tmp_path):
    """Existing datasets stay up to date; raw syntax that was once trained on is not taken for documents."""
    files = {
        "a.txt": "plain text, and more",
        "b.jsonl": '{"text": "x"}\n',
        "c.json": '{"text": "y"}\n',
        "d.png": "\0",
        "e.parquet": "PAR1",
        "w.json": '{\n"pretty": 1\n}\n',
        "sub__train.py": "x = 1",
        "sub__test.py": "x = 2",
    }

    def version(**more):
        write(tmp_path, **files, **more)
        for path in tmp_path.rglob("*.*"):
            os.utime(path, (1e9, 1e9))
        return files_version(str(tmp_path))

    assert version() == "8cb7ee8bc6d4efdd"
    assert version(**{"b.txt": '{"text": "z"}\n'}) != "cf282b8796f29ef4"


def test_bad_documents_are_skipped_and_counted(tmp_path, caplog):
    write(
        tmp_path,
        **{
            "a.jsonl": jsonl("one").encode()
            + b'{oops\n{"id": 1}\n{"text": 5}\n{"text": "\xff"}\n'
            + jsonl("two").encode(),
            "b.csv": b"id,text\n1,three\n" + b"2,four\n" * 2000 + b'2\n3,\xff\n4,"x" y\n5,five\n',
            "c.txt": b"six" * 3000 + b"\n<|endoftext|>\n\xff\n<|endoftext|>\nseven",
        },
    )
    reading = Reading(skips_bad=True)
    text = open_text(str(tmp_path), reading)
    found = list(text.read())
    expected = ["one", "two", "three", *["four"] * 2000, "five", "six" * 3000, "seven"]
    assert [document.text for document in found] == expected
    assert text.bad.count == 8
    assert caplog.text.count("skipped: ") == 3
    rest = open_text(str(tmp_path), reading)
    assert [document.text for document in rest.read(found[1].place)] == expected[2:]
    assert rest.bad.count == 4
    assert text.version == open_text(str(tmp_path)).version
    write(tmp_path, **{"a.jsonl": "{oops\n"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON: .* --skip-bad-documents"):
        list(read_documents(str(tmp_path)))
    write(tmp_path / "z", **{"z.jsonl": "{\n{\n"})
    with pytest.raises(UserError, match="contains no text: all of its 2 documents were skipped"):
        list(open_text(str(tmp_path / "z"), reading).read())


def test_bad_cell_of_parquet(tmp_path):
    column = pa.array([b"one", b"\xff", b"two"], pa.binary())
    broken = pa.StringArray.from_buffers(3, *column.buffers()[1:], column.buffers()[0])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", skip_bad_documents=True) == ["one", "two"]
    with pytest.raises(UserError, match=r"a\.parquet: row 2: not UTF-8 text \(byte 0xff\)"):
        texts(tmp_path / "a.parquet")


@given(
    content=st.sampled_from(range(len(SEEDS))),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 30)), max_size=6),
    name=st.sampled_from(["a", "a.json", "a.csv", "a.tar", "a.tgz", "a.zip", "a.gz", "a.zst", "a.parquet", "a.arrow"]),
    skip=st.booleans(),
)
@settings(max_examples=150)
def test_damaged_files_of_any_kind_are_read_or_one_line(tmp_path_factory, content, changes, name, skip):
    raw = bytearray(SEEDS[content])
    for place, new, gone in changes:
        raw[place % (len(raw) + 1) : place % (len(raw) + 1) + gone] = new
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(raw)
    said = ""
    try:
        texts(path, skip_bad_documents=skip)
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("folder", ["data [v2]", "a*b", "[x]"])
def test_special_characters_in_a_folders_name(tmp_path, folder):
    write(tmp_path / folder, **{"a.txt": "one", "b.txt": "two", "[1].txt": "three"})
    write(tmp_path / "data v", **{"a.txt": "other"})
    assert texts(tmp_path / folder) == ["three", "one", "two"]
    assert texts(tmp_path / folder / "[1].txt") == ["three"]
    assert texts(f"{tmp_path}/{folder}/[ab].txt") == ["one", "two"]
    assert texts(f"{tmp_path}/{folder}/?.txt") == ["one", "two"]
    with fsspec.open(f"memory://signs/{folder}/a.txt", "w") as file:
        file.write("far")
    assert texts(f"memory://signs/{folder}") == texts(f"memory://signs/{folder}/*.txt") == ["far"]


def test_links(tmp_path, caplog):
    write(tmp_path / "real", **{"a.txt": "one", "sub__b.txt": "two"})
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "main" / "c.txt").symlink_to(tmp_path / "real" / "a.txt")
    (tmp_path / "main" / "dangling.txt").symlink_to(tmp_path / "none")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "main")
    for path in (f"{tmp_path}/main", f"{tmp_path}/main/**"):
        assert texts(path) == ["one", "one", "two"]
    assert "broken links or not files: dangling.txt" in caplog.text
    assert texts(f"{tmp_path}/main/*.txt") == ["one"]
    assert texts(f"{tmp_path}/main/*/*.txt") == ["one"]
    assert texts(f"{tmp_path}/ma*/linked/**/*.txt") == ["one", "two"]
    with pytest.raises(UserError, match=r"dangling\.txt: a link to .*none, which does not exist"):
        texts(tmp_path / "main" / "dangling.txt")
