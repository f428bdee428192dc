"""One column of text out of a Parquet or Arrow file, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain_xla.errors import UserError

COLUMN_SUFFIXES = (".parquet", ".arrow")
ROWS = 1024  # at a time: some MB of web pages


def read_column(raw: Any, where: str, column: str) -> Iterator[tuple[str, float]]:
    """(text, share of the file that has been read) of each row; rows without a value are "".

    Args:
        raw: the open file.
        where: what to call it in an error.
        column: name of the column.

    Raises:
        UserError: damaged, no such column, or one that is not text.
    """
    try:
        if where.endswith(".parquet"):
            file = pq.ParquetFile(raw)
            check_column(file.schema_arrow, where, column)
            yield from _texts(file.iter_batches(ROWS, columns=[column]), where, column, file.metadata.num_rows)
        else:
            reader = _arrow(raw)
            check_column(reader.schema, where, column)
            yield from _texts(_arrow_batches(reader), where, column, None)
    except pa.ArrowException as error:
        raise UserError(f"{where}: damaged ({' '.join(str(error).split())[:120]}): fetch it again") from None


def check_column(schema: pa.Schema, where: str, column: str) -> None:
    """Refuse a column that is not there, or is not text.

    Raises:
        UserError: naming the columns that there are.
    """
    if column not in schema.names:
        raise UserError(f"{where}: no column {column!r} among {', '.join(schema.names)}: name one with --text-column")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{where}: column {column!r} holds {kind}, not text: name another with --text-column")


def _arrow(raw: Any) -> Any:
    """A reader of either of Arrow's two layouts: the one with an index at its end, or a stream (as `datasets` writes)."""
    try:
        return pa.ipc.open_file(raw)
    except pa.ArrowInvalid:
        raw.seek(0)
        return pa.ipc.open_stream(raw)


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _texts(batches: Iterator[Any], where: str, column: str, rows: int | None) -> Iterator[tuple[str, float]]:
    done = 0
    for batch in batches:
        texts = batch.column(column).to_pylist()
        done += len(texts)
        share = done / rows if rows else 0.0  # a stream does not say how long it is
        for text in texts:
            yield text or "", share
