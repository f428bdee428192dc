"""A column of text from a Parquet or Arrow file, a batch of rows at a time.

`a.b` is the field `b` of the column `a`, unless a column has that very name.

Parquet stores repeated texts once: a file of a kilobyte may hold a thousand texts of ten megabytes. So texts are looked up for
a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain_xla.errors import UserError
from pretrain_xla.text.reading import Bad

ROWS = 1024  # at a time: some MB of web pages
_TEXTS = 16  # of them as strings at a time
# Bytes are text whose writer did not declare it as such: Impala, Hive, old versions of Spark.
_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


def read_column(
    raw: Any, kind: Literal["parquet", "arrow"], where: str, column: str
) -> Iterator[tuple[str | Bad, float]]:
    """(text, fraction of the file read so far) of each row; rows without a value are "".

    Args:
        raw: the open file.
        kind: kind of the file.
        where: its name in error messages.
        column: name of the column.

    Raises:
        UserError: the file is damaged, or has no such column of text.
    """
    try:
        if kind == "parquet":
            file = pq.ParquetFile(raw)
            path = check_column(file.schema_arrow, where, column)
            file = pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=[".".join(path)])
            yield from _texts(file.iter_batches(ROWS, columns=[column]), path, where, file.metadata.num_rows)
        else:
            reader = _arrow(raw)
            path = check_column(reader.schema, where, column)
            yield from _texts(_arrow_batches(reader), path, where, None)
    except pa.ArrowException as error:
        raise UserError(f"{where}: damaged ({' '.join(str(error).split())[:120]}): fetch it again") from None


def check_column(schema: pa.Schema, where: str, column: str) -> list[str]:
    """The path of a column of text: its name, or the names of a column and of the fields within it.

    Raises:
        UserError: there is no such column, or it is not text; the message names those that there are.
    """
    path = [column] if column in schema.names else column.split(".")
    if path[0] not in schema.names:
        names = " ".join(", ".join(schema.names).split())
        raise UserError(f"{where}: no column {column!r} among {names}: name one with --text-column")
    kind = schema.field(path[0]).type
    for name in path[1:]:
        inside = [kind.field(index).name for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if name not in inside:
            among = f" among {' '.join(', '.join(inside).split())}" if inside else ""
            raise UserError(f"{where}: no field {name!r} of {column!r}{among}: name one with --text-column")
        kind = kind.field(name).type
    if pa.types.is_dictionary(kind):  # each text is stored once, and rows hold its index
        kind = kind.value_type
    if not any(is_kind(kind) for is_kind in _TEXT):
        raise UserError(
            f"{where}: column {column!r} holds {' '.join(str(kind).split())}, not text: name another with --text-column"
        )
    return path


def texts_of(table: Any, path: list[str]) -> list[str | None]:
    """The texts of a batch or table.

    Args:
        table: the batch or table.
        path: from `check_column`.

    Raises:
        UnicodeDecodeError: one is not UTF-8.
    """
    return [value.decode() if isinstance(value, bytes) else value for value in _column(table, path).to_pylist()]


def _column(table: Any, path: list[str]) -> Any:
    column = table.column(path[0])
    column = pc.struct_field(column, path[1:]) if len(path) > 1 else column
    return pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column


def _arrow(raw: Any) -> Any:
    """A reader for either of Arrow's two layouts: with an index at the end, or a stream (as `datasets` writes)."""
    try:
        return pa.ipc.open_file(raw)
    except pa.ArrowInvalid:
        raw.seek(0)
        return pa.ipc.open_stream(raw)


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _texts(batches: Iterator[Any], path: list[str], where: str, rows: int | None) -> Iterator[tuple[str | Bad, float]]:
    done = 0
    for batch in (part.slice(begin, _TEXTS) for part in batches for begin in range(0, part.num_rows, _TEXTS)):
        try:
            texts: list[str | Bad | None] = [*texts_of(batch, path)]
        except UnicodeDecodeError:
            binary = _column(batch, path).cast(pa.large_binary()).to_pylist()
            texts = [_decoded(value, f"{where}: row {row}") for row, value in enumerate(binary, start=done + 1)]
        done += len(texts)
        share = done / rows if rows else 0.0  # a stream does not say how long it is
        for text in texts:
            yield text or "", share


def _decoded(value: bytes | None, place: str) -> str | Bad:
    try:
        return (value or b"").decode()
    except UnicodeDecodeError as error:
        return Bad(f"{place}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it or remove it")
