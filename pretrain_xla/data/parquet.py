"""Parquet shards: a column `input_ids` of lists, whose concatenated ids are the shard's tokens.

Rows are blocks of one length, as tokenisation with `datasets` writes them; the last may be shorter. Rows of different lengths
are refused: they are separate documents without end-of-text, and concatenation would run one into the next. Ranges of tokens
cannot be read efficiently from a compressed file, so a Parquet shard is decoded once into the cache (see `shard_loader`) and
read there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain_xla.data.formats import DTYPES
from pretrain_xla.errors import UserError

COLUMN = "input_ids"
_WRITTEN_BLOCK = 1024  # tokens in a row that we write
_ROWS_AT_A_TIME, _TOKENS_AT_A_TIME = 1024, 2**24
_TAIL = 2**16
_MOST_TOKENS_PER_BYTE = 1000  # of a file; more than a megabyte of zeros has


@dataclass(frozen=True)
class ParquetSummary:
    """The footer of a Parquet shard."""

    tokens: int
    dtype: np.dtype[Any]
    """Type of the decoded ids: uint16 if the footer proves that they fit."""
    max_id: int | None
    """Highest id, if the footer has it."""


def summarise(where: str, size: int, read: Callable[[int, int], bytes]) -> ParquetSummary:
    """Read a shard's footer and nothing else.

    Args:
        where: for errors.
        size: bytes of the file.
        read: returns the bytes from one position up to another.

    Raises:
        UserError: it is truncated or damaged, or has no `input_ids` column of lists of integers.
    """
    tail = read(max(0, size - _TAIL), size)
    if size < 12 or not tail.endswith(b"PAR1"):
        raise UserError(f"{where}: truncated: the end of a Parquet file is missing: write it again or remove it")
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if footer > size - 4:
        raise UserError(f"{where}: its footer is damaged: write it again or remove it")
    if footer > len(tail):
        tail = read(size - footer, size)
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-footer:]))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: its footer is damaged ({_brief(error)}): write it again or remove it") from None
    column, kind = _column(where, metadata)
    groups = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
    known = [group.statistics for group in groups]
    max_id = None
    if groups and all(statistics is not None and statistics.has_min_max for statistics in known):
        if min(statistics.min for statistics in known) < 0:
            raise UserError(f"{where}: has a negative token id: tokenise it again without padding or labels")
        max_id = max(int(statistics.max) for statistics in known)
    small = (kind.bit_width == 16 and not pa.types.is_signed_integer(kind)) or (max_id is not None and max_id < 2**16)
    tokens = sum(group.num_values for group in groups)
    if tokens > _MOST_TOKENS_PER_BYTE * size + 2**20:
        raise UserError(
            f"{where}: says that its {size:,} bytes hold {tokens:,} ids, which no text does: damaged, or made to fill the "
            "memory: tokenise it again"
        )
    return ParquetSummary(tokens, DTYPES[0 if small else 1], max_id)


def _column(where: str, metadata: Any) -> tuple[int, Any]:
    """Position of the leaf column, and the type of its ids."""
    schema = metadata.schema.to_arrow_schema()
    if COLUMN not in schema.names:
        raise UserError(f"{where}: no column {COLUMN!r} (it has {', '.join(schema.names)}): tokenise it with `prepare`")
    kind = schema.field(COLUMN).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{where}: {COLUMN} holds {kind}, not lists of integers: tokenise it again")
    leaves = [metadata.schema.column(index).path.split(".")[0] for index in range(len(metadata.schema))]
    return leaves.index(COLUMN), kind.value_type


def blocks(where: str, path: str, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The ids of a local Parquet shard in blocks: one-dimensional, of type `dtype`.

    Args:
        where: for errors, the origin of the file.
        path: local path.
        dtype: from `summarise`.

    Raises:
        UserError: it is damaged, a row is missing, rows differ in length, or an id does not fit.
    """
    length: int | None = None
    short_row_seen = False
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_rows_at_a_time(where, file.metadata), columns=[COLUMN]):
                rows = batch.column(0)
                ids = rows.flatten()
                if rows.null_count or ids.null_count:
                    raise UserError(f"{where}: {COLUMN} has missing values: tokenise it again")
                lengths = rows.value_lengths().to_numpy(zero_copy_only=False)
                length = int(lengths[0]) if length is None else length
                if short_row_seen or (lengths[:-1] != length).any() or lengths[-1] > length:
                    raise UserError(
                        f"{where}: the rows of {COLUMN} differ in length: join them into blocks of one length, with "
                        "end-of-text between documents"
                    )
                short_row_seen = lengths[-1] < length
                yield _checked(where, ids.to_numpy(zero_copy_only=False), dtype)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: damaged ({_brief(error)}): write it again or remove it") from None


def _rows_at_a_time(where: str, metadata: Any) -> int:
    column, _ = _column(where, metadata)
    tokens = sum(metadata.row_group(group).column(column).num_values for group in range(metadata.num_row_groups))
    return max(1, min(_ROWS_AT_A_TIME, _TOKENS_AT_A_TIME * metadata.num_rows // max(tokens, 1)))


def _checked(where: str, ids: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(dtype).max):
        raise UserError(
            f"{where}: has token ids outside 0 to {np.iinfo(dtype).max}: damaged, or not ids: write it again"
        )
    return ids.astype(dtype)


def encode(tokens: np.ndarray) -> bytes:
    """A Parquet file of the tokens: int32, the type that readers expect, in rows of 1,024; the last may be shorter."""
    starts = np.append(np.arange(0, len(tokens), _WRITTEN_BLOCK), len(tokens)).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(starts), pa.array(tokens.astype(np.int32)))
    file = io.BytesIO()
    pq.write_table(pa.table({COLUMN: column}), file, compression="zstd")
    return file.getvalue()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]
