from __future__ import annotations

import gzip
import json
import logging
import lzma
import random

import fsspec
import pytest
import zstandard

from pretrain_xla.errors import UserError
from pretrain_xla.text import documents
from pretrain_xla.text.documents import files_version
from pretrain_xla.text.sources import open_source

NOISE = "".join(random.Random(0).choices("abcdefgh ", k=100_000)).encode()  # so that it does not shrink to nothing


def read_documents(path, **arguments):
    return (document.text for document in documents.read_documents(path, **arguments))


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_text_file_is_one_document_that_keeps_its_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n  two\n\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one\n\n\n  two"]


def test_separator_lines_divide_and_inline_ones_do_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfone\r\n<|endoftext|>\r\n\n<|endoftext|>\ntwo <|endoftext|> still\n<|endoftext|>\n"
    )
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one", "two <|endoftext|> still"]


def test_markers_of_gpt2_simple_within_a_line_are_warned_about_once(tmp_path, caplog):
    path = tmp_path / "text.txt"
    path.write_text("a\n<|startoftext|>one<|endoftext|>\n<|startoftext|>two<|endoftext|>\n")
    assert len(list(read_documents(str(path)))) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"{path}:2: <|startoftext|> on the same line as text is ordinary text" in said[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "c4-train.00000-of-01024.json.gz"])
def test_json_lines(tmp_path, name):
    opener = gzip.open if name.endswith("gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write(jsonl("one", "  ", "two\nlines") + "\n" + '{"text": "lone \\ud800 surrogate", "id": 1}\n')
    assert list(read_documents(str(tmp_path / name))) == ["one", "two\nlines", "lone \ufffd surrogate"]


def test_folder_is_read_in_order_of_name_without_files_that_are_not_text(tmp_path, caplog):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    (tmp_path / "b.md").write_text("third")
    (tmp_path / "a.jsonl").write_text(jsonl("first", "second"))
    (tmp_path / "sub" / "c.py").write_text("fourth = 4\n")
    (tmp_path / "z.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "y.bin").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "w.json").write_text('{\n  "pretty": 1\n}\n')
    with caplog.at_level(logging.WARNING):
        assert list(read_documents(str(tmp_path))) == ["first", "second", "third", "fourth = 4"]
    assert "3 of 6 files left out: no such key or column in it: w.json; not text: y.bin, z.png" in caplog.text


def test_zst_with_a_long_window(tmp_path):
    """As compressed by `zstd --long=31`, like the dumps of Reddit."""
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=long)
    frames = []
    for text in ("one", NOISE.decode()):
        frame = packer.compressobj()
        frames.append(frame.compress(jsonl(text).encode()) + frame.flush())
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert list(read_documents(str(path))) == ["one", NOISE.decode()]
    path.write_bytes(b"".join(frames)[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read: Truncated"):
        list(read_documents(str(path)))


def test_any_fsspec_url():
    with fsspec.open("memory://corpus/a.txt", "w") as file:
        file.write("from memory")
    assert list(read_documents("memory://corpus")) == list(read_documents("memory://corpus/a.txt")) == ["from memory"]


def test_character_cut_off_by_the_text_check_is_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 8191 + "é")
    assert next(read_documents(str(tmp_path / "a.txt"))).endswith("é")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl("x") + "{oops\n", "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"content": "x"}\n', "a.jsonl:1: no key 'text': its keys are 'content'"),
        ("a.jsonl", '["x"]\n', "a.jsonl:1: no key 'text'"),
        ("a.jsonl", '{"text": 5}\n', "a.jsonl:1: 'text' is int"),
        ("a.txt", "\n \n", "contains no text"),
        ("a.jsonl", "", "contains no text"),
        ("a.txt", b"\xff\xfe\0", "not UTF-8 text"),
        ("a.txt", b"x" * 9000 + b"\xff", "a.txt: not UTF-8 text (byte 0xff)"),
        ("a.jsonl.gz", gzip.compress(jsonl("x" * 999).encode(), mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be read"),
        ("a.txt.zst", zstandard.compress(NOISE)[:-9], "a.txt.zst: cannot be read: Truncated"),
        (
            "a.txt.zst",
            zstandard.compress(b"x") + zstandard.compress(NOISE)[:-9],
            "a.txt.zst: cannot be read: Truncated",
        ),
        ("a.txt.xz", lzma.compress(NOISE)[:-5000] + b"x" * 5000, "a.txt.xz: cannot be read"),
        ("a.txt.zip", b"PK\3\4\0\0", "a.txt.zip: damaged"),
        ("a.docx", b"PK\3\4\0\0", "not UTF-8 text"),
        ("a.jsonl", jsonl("x") + '{"text":' + "[" * 100_000 + "\n", "a.jsonl:2: cannot be read"),
        ("a.jsonl", '{"text":' + "9" * 5000 + "}\n", "a.jsonl:1: cannot be read"),
        ("a.json", '"x"', "a.json: JSON, but neither a list nor objects: convert it to .jsonl"),
        ("a.json", '[\n{"text": "x"},\n', "a.json: truncated: its list has no end"),
        ("a.json", '[\n{"text": "x"}, {"text": "y', "a.json: ends within a value"),
        ("a.json", '[{"text": "x"}, oops' + " " * 2000 + "]", "a.json: ends within a value, or is not JSON"),
        ("a.json.gz", gzip.compress(b'{\n"body": "x"}\n', mtime=0), "a.json.gz: value 1: no key 'text'"),
        ("a.csv", "id,body\n1,x\n", "a.csv: no column 'text' among id, body: name one with --text-column"),
        ("a.csv", "id,text\n1,x\n2,y,z\n", "a.csv:3: 3 cells where there are 2 columns"),
        ("a.tsv", 'id\ttext\n1\t"x" y\n', "a.tsv:2: not a valid row"),
        ("a.csv", 'id,text\n1,"x\n', "a.csv:2: not a valid row: unexpected end of data"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "raw",
)
def test_bad_input_is_one_line_that_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        list(read_documents(str(tmp_path / name)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_reported_before_reading_starts(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_documents(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no files"):
        read_documents(str(tmp_path))
    with pytest.raises(UserError, match="nosuch"):
        read_documents("nosuch://bucket/x")


def test_version_follows_every_change_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    versions = [files_version(str(tmp_path)), files_version(str(tmp_path))]
    (tmp_path / "b.txt").write_text("two")
    versions.append(files_version(str(tmp_path)))
    (tmp_path / "b.txt").write_text("two more")
    versions.append(open_source(str(tmp_path)).version)
    versions.append(open_source(str(tmp_path), document_per_line=True).version)
    assert versions[0] == versions[1]
    assert len(set(versions)) == 4
