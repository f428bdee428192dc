"""Columns of text that Parquet and Arrow do not declare as text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.text.documents import open_text
from pretrain_xla.text.reading import Reading
from pretrain_xla.text.sources import open_source

TEXTS = ["Grüße", "two\nlines", None, "Grüße"]
BYTES = [text and text.encode() for text in TEXTS]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(BYTES, pa.binary()),
        pa.array(BYTES, pa.large_binary()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(BYTES).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_bytes_and_dictionary_encoded_texts_are_text(column: pa.Array, tmp_path: Path) -> None:
    table = pa.table({"text": column, "deep": pa.StructArray.from_arrays([column], ["text"])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        for key in ("text", "deep.text"):
            read = open_text(str(tmp_path / name), Reading(key)).read()
            assert [document.text for document in read] == [text for text in TEXTS if text]


def test_bytes_that_are_not_text_are_a_bad_document_or_one_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": pa.array([b"one", b"\xff\xd8", b"two"])}), tmp_path / "set" / "a.parquet")
    path = str(tmp_path / "set" / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 2: not UTF-8 text \(byte 0xff\)"):
        list(open_text(path).read())
    skipping = open_text(path, Reading(skips_bad=True))
    assert [document.text for document in skipping.read()] == ["one", "two"]
    with pytest.raises(UserError, match=r"'text' is not UTF-8 text \(byte 0xff\): name another with --text-column"):
        list(open_source(f"hf:{tmp_path / 'set'}", streaming=True).read(None))
