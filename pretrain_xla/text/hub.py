"""Datasets of the Hugging Face Hub, or folders with the same layout, through `datasets`: streamed, or downloaded first.

Streaming starts at once and needs no disk; a download is read faster the second time. Both give the same documents in the
same order, so a preparation may be resumed with the other.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.storage.retries import describe
from pretrain_xla.text.documents import Document, cleaned
from pretrain_xla.text.readers.columns import ROWS, check_column, texts_of
from pretrain_xla.text.source import Source

PREFIX = "hf:"


def hub_source(name: str, *, text_column: str, streaming: bool, cache_dir: str | None) -> Source:
    """The source `hf:DATASET[:CONFIG[:SPLIT]]`; the split is `train` unless named.

    Args:
        name: such as `hf:HuggingFaceFW/fineweb-edu:sample-10BT`, `hf:allenai/c4:ja`, `hf:./folder/of/parquet`.
        text_column: the column that holds the text.
        streaming: read over the network instead of downloading first.
        cache_dir: where downloads are kept. None means where `datasets` keeps them.

    Raises:
        UserError: no such dataset, config or split, or no network.
    """
    path, config, split = (*name.removeprefix(PREFIX).split(":"), "", "")[:3]
    if not path or name.count(":") > 3:
        raise UserError(f"source {name!r}: write hf:DATASET, hf:DATASET:CONFIG or hf:DATASET:CONFIG:SPLIT")
    if os.path.isfile(os.path.join(path, "state.json")) and os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise UserError(f"source {name!r}: a folder written by `save_to_disk`: give it without hf:, as {path}")
    place = {"path": path, "name": config or None, "cache_dir": cache_dir}
    split = split or "train"
    builder = _call(name, "load_dataset_builder", place)
    rows = builder.info.splits[split].num_examples if split in (builder.info.splits or {}) else None
    version = _version(builder)
    if os.path.isdir(path):  # `datasets` would use its cache of the folder's earlier files
        place["cache_dir"] = os.path.join(cache_dir or _cache(), version)
    place["split"] = split
    read = _stream if streaming else _rows
    return Source(name, f"{version}:{split}:{text_column}", functools.partial(read, name, place, text_column, rows))


def _version(builder: Any) -> str:
    """A checksum of the names of the files and of their commits, ETags or modification times."""
    files = builder.config.data_files or {}
    listed = [(split, list(paths), paths.origin_metadata) for split, paths in sorted(files.items())]
    return hashlib.sha256(repr((builder.config_id, builder.hash, listed)).encode()).hexdigest()[:16]


def _cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def _call(name: str, function: str, arguments: dict[str, Any]) -> Any:
    import datasets  # seconds to import, and only this needs it

    try:
        return getattr(datasets, function)(**arguments)
    except Exception as error:  # it and each library that it reads through have their own errors
        # "An error occurred while generating the dataset" has the actual error as its cause.
        cause = f" ({describe(error.__cause__)})" if error.__cause__ is not None else ""
        raise UserError(f"source {name!r}: {' '.join(str(error).split())[:300]}{cause}") from None


def _rows(name: str, place: dict[str, Any], column: str, rows: int | None, begin: Any) -> Iterator[Document]:
    """Documents of a downloaded dataset. A place is the number of rows read; a place of `_stream` holds that, too."""
    table = _call(name, "load_dataset", place)
    path = check_column(table.features.arrow_schema, name, column)
    table = table.select_columns([path[0]]).with_format("arrow")
    passed = begin[2] if isinstance(begin, list) else begin or 0
    for first in range(passed, len(table), ROWS):
        texts = _texts(name, table[first : first + ROWS], path)
        for row, text in enumerate(texts, start=first + 1):
            if document := cleaned(text or ""):
                yield Document(document, row, row / len(table))


def _stream(name: str, place: dict[str, Any], column: str, rows: int | None, begin: Any) -> Iterator[Document]:
    """Documents of a streamed dataset. A place is the dataset's state before a batch, the rows read of it, and all rows read.

    A place of `_rows` has no such state, so the rows before it are read again.
    """
    stream = _call(name, "load_dataset", {**place, "streaming": True})
    path = check_column(stream.features.arrow_schema, name, column) if stream.features else column.split(".")
    stream = stream.select_columns([path[0]]).with_format("arrow")
    if not isinstance(begin, list):
        begin = [stream.state_dict(), begin or 0, begin or 0]
    state, passed, done = begin
    stream.load_state_dict(state)
    done -= passed
    for batch in _batches(name, stream):
        texts = _texts(name, batch, path)
        for row, text in enumerate(texts, start=1):
            if row > passed and (document := cleaned(text or "")):
                yield Document(document, [state, row, done + row], (done + row) / rows if rows else None)
        state, passed, done = stream.state_dict(), max(0, passed - len(texts)), done + len(texts)


def _texts(name: str, table: Any, path: list[str]) -> list[str | None]:
    try:
        return texts_of(table, path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"source {name!r}: {'.'.join(path)!r} is not UTF-8 text (byte 0x{byte:02x}): name another with --text-column"
        ) from None


def _batches(name: str, stream: Any) -> Iterator[Any]:
    try:
        yield from stream.iter(ROWS)
    except Exception as error:  # as in `_call`
        raise UserError(
            f"source {name!r}: reading was interrupted ({describe(error)}): run the same command again to go on"
        ) from None
