"""Documents of CSV and TSV: one a row, from the column of that name in the first row.

Quoted cells may contain line ends. A row with another number of cells than the first, or with a quote that does not end at
the end of a cell, is a bad document: silently accepted, it would take in the rows that follow.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from pretrain_xla.errors import UserError
from pretrain_xla.text.open_file import LONGEST_LINE, lines_of
from pretrain_xla.text.reading import Bad, Reading, is_utf8

SUFFIXES = (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_SKIP = "fix it, or leave such documents out with --skip-bad-documents"


def read_table(stream: IO[str], where: str, reading: Reading) -> Iterator[str | Bad]:
    """The document of each row; a row without a value has none.

    Args:
        stream: the text, with its line ends unchanged.
        where: its name in error messages.
        reading: the user's options.

    Raises:
        UserError: no such column.
    """
    csv.field_size_limit(LONGEST_LINE)  # Python's own limit is 131,072 characters, less than a book
    lines = lines_of(stream, where)
    first = next(lines, "")
    delimiter = delimiter_of(first, reading.column)
    names = _cells(first, delimiter)
    if reading.column not in names:
        found = " ".join(", ".join(names).split())[:200]
        raise UserError(
            f"{where}: no column {reading.column!r} among {found or 'none'}: name one with "
            "--text-column (the first line must name the columns)"
        )
    column, rows = names.index(reading.column), csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Bad(f"{where}:{rows.line_num + 1}: not a valid row: {error}: {_SKIP}")
            continue
        if row and len(row) != len(names):
            yield Bad(f"{where}:{rows.line_num + 1}: {len(row)} cells where there are {len(names)} columns: {_SKIP}")
        elif row and reading.skips_bad and not is_utf8(row[column]):
            yield Bad(f"{where}:{rows.line_num + 1}: not UTF-8 text")
        elif row:
            yield row[column]


def has_column(first_line: str, column: str) -> bool:
    """Whether the first line of a table names a column."""
    return column in _cells(first_line, delimiter_of(first_line, column))


def delimiter_of(first_line: str, column: str) -> str:
    """The delimiter with which the first line has a cell of the column's name, or else the most frequent one in it."""
    named = (sign for sign in _DELIMITERS if column in _cells(first_line, sign))
    return next(named, max(_DELIMITERS, key=first_line.count))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []
