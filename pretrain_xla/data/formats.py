"""The formats of files of token ids, and how they are recognised: by the first bytes, never by a setting.

| format     | begins with                                             | ids               | who writes it              |
|------------|---------------------------------------------------------|-------------------|----------------------------|
| `npy`      | `\\x93NUMPY`, a header with type and shape               | integers, one row | `prepare`, build-nanogpt   |
| `bin`      | 256 int32: magic 20240520, version 1, number of tokens  | uint16            | llm.c, modded-nanogpt      |
| `bin`      | 256 int32: magic 20240801, version 7, number of tokens  | uint32            | llm.c for Llama 3          |
| `raw`      | the first id; `.bin`, `.ds`, or `.npy` without a header | 16, 32, 64 bits   | nanoGPT; datatrove; OLMo   |
| `litdata`  | number of items, their offsets; an index.json in its folder | by the index      | litdata, litgpt            |
| `megatron` | the first id; an .idx of the same name                   | by the index      | Megatron-LM                |
| `parquet`  | `PAR1`; a column `input_ids` of lists                   | any integer       | tokenisation by `datasets` |

All but the last are a row of numbers after a header, and can be read by position. Parquet is compressed, and has to be
decoded first (`parquet`). A file without a header could be anything, so signs of other kinds of files are looked for: a header
with an unknown magic number, the first bytes of other formats, text, an odd length (`headerless`).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pretrain_xla.data.headerless import dtype_of, looks_like_ids, what_else
from pretrain_xla.data.index_files import ReadSibling, litdata_chunk, megatron_dtype
from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer

Format = Literal["npy", "bin", "raw", "litdata", "megatron", "parquet"]

WRITTEN_SUFFIXES = (".npy", ".bin", ".parquet")
SUFFIXES = (*WRITTEN_SUFFIXES, ".ds")
DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
HEAD_BYTES = 4096  # that `layout` needs of a file

# Remote shards are opened in several threads. Python 3.11's parser of literals, which numpy uses, fails if the garbage
# collector lets another thread parse meanwhile ("AST constructor recursion depth mismatch").
_PARSING = threading.Lock()
_BIN_HEADER = 256 * 4
_BIN_KINDS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): DTYPES[0], (20240801, 7): DTYPES[1]}
_BIN_MAGICS = frozenset(magic for magic, _ in _BIN_KINDS)
_EVALUATION_MAGIC = 20240522
_MOST_BIN_TOKENS = 2**31 - 1  # the count is an int32


@dataclass(frozen=True)
class Layout:
    """Where the ids are in a file that can be read by position."""

    format: Format
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first id."""
    tokens: int


def is_parquet(head: bytes) -> bool:
    """Whether a file with these first bytes is Parquet."""
    return head.startswith(b"PAR1")


def layout(where: str, size: int, head: bytes, read_sibling: ReadSibling = lambda name: None) -> Layout:
    """Recognise a file of ids other than Parquet, and check its header against its size.

    Args:
        where: path or URL, for errors; its suffix matters only for a file without a header.
        size: bytes of the file.
        head: its first `HEAD_BYTES`, or all of it.
        read_sibling: see `ReadSibling`.

    Raises:
        UserError: the format is unknown, the header contradicts itself, or the file is truncated or too long.
    """
    refuse_pointer(head, where)
    is_npy = where.endswith(".npy") and not looks_like_ids(head)  # OLMo's have no header, whatever their name
    if head.startswith(b"\x93NUMPY") or is_npy:
        found = _npy(where, head)
    elif where.endswith(".parquet"):
        raise UserError(f"{where}: not a Parquet file (it does not begin with PAR1): remove it or write it again")
    else:
        words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
        found = (
            _bin(where, words) if len(words) and int(words[0]) in _BIN_MAGICS else _raw(where, size, head, read_sibling)
        )
    expected = found.offset + found.tokens * found.dtype.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise UserError(
            f"{where}: {fault}: {size:,} bytes on disk where its header says {expected:,}: write it again or remove it"
        )
    return found


def _npy(where: str, head: bytes) -> Layout:
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _PARSING:
            shape, _, dtype = read(file)
    except Exception as error:  # numpy reads it as Python literals, with all errors of Python's parser
        raise UserError(
            f"{where}: not a complete .npy file ({' '.join(str(error).split())[:80]}): remove it or write it again"
        ) from None
    if dtype.kind not in "iu" or not dtype.newbyteorder("<") == dtype or len(shape) != 1:
        raise UserError(f"{where}: holds {dtype}{list(shape)}; a shard is one row of integers: convert it")
    return Layout("npy", dtype, file.tell(), shape[0])


def _bin(where: str, words: np.ndarray) -> Layout:
    if len(words) < 3:
        raise UserError(f"{where}: truncated inside its header: write it again or remove it")
    magic, version, tokens = (int(word) for word in words[:3])
    if (magic, version) not in _BIN_KINDS:
        known = next(known for m, known in _BIN_KINDS if m == magic)
        raise UserError(
            f"{where}: version {version} of the .bin format with magic number {magic}; only {known} is supported"
        )
    if tokens < 0:
        raise UserError(f"{where}: its header says {tokens} tokens: write it again or remove it")
    return Layout("bin", _BIN_KINDS[magic, version], _BIN_HEADER, tokens)


def _raw(where: str, size: int, head: bytes, read_sibling: ReadSibling) -> Layout:
    words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(words) and words[0] == _EVALUATION_MAGIC:
        raise UserError(
            f"{where}: multiple-choice questions in llm.c's format (magic {words[0]}), not text to train on"
        )
    if other := what_else(head):
        raise UserError(f"{where}: {other}: not a token shard: remove it, or prepare the text that it was made from")
    if chunk := litdata_chunk(where, size, head, read_sibling):
        return _ids(where, "litdata", size, *chunk)
    if dtype := megatron_dtype(where, read_sibling):
        return _ids(where, "megatron", size, dtype, 0)
    # A header of 256 numbers uses only the first few; text has no such run of one id.
    if len(words) >= 256 and words[:4].any() and not words[8:256].any():
        raise UserError(
            f"{where}: begins with a header whose magic number {words[0]} is unknown "
            f"(known: {', '.join(map(str, sorted(_BIN_MAGICS)))}): write it again or convert it to .npy"
        )
    return _ids(where, "raw", size, dtype_of(head), 0)


def _ids(where: str, format: Format, size: int, dtype: np.dtype[Any], offset: int) -> Layout:
    """The layout of a file that holds ids from an offset to its end."""
    if (size - offset) % dtype.itemsize:
        raise UserError(
            f"{where}: odd length, {size:,} bytes, where ids of {dtype.itemsize} bytes are expected: truncated? write it again"
        )
    return Layout(format, dtype, offset, (size - offset) // dtype.itemsize)


def header(format: Format, tokens: np.ndarray) -> bytes:
    """The header before a row of ids, uint16 or uint32, in a `npy` or `bin` file.

    Raises:
        UserError: more tokens than the format can count.
    """
    if format == "npy":
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        return file.getvalue()
    if len(tokens) > _MOST_BIN_TOKENS:
        raise UserError(f"a .bin shard holds at most {_MOST_BIN_TOKENS:,} tokens: choose a smaller shard_size")
    words = np.zeros(256, "<i4")
    words[:2] = next(kind for kind, dtype in _BIN_KINDS.items() if dtype == tokens.dtype)
    words[2] = len(tokens)
    return words.tobytes()


def is_shard(name: str) -> bool:
    """Whether a file's name has the suffix of a shard."""
    return name.endswith(SUFFIXES)


def suffix(format: Format) -> str:
    """The suffix of a format's files."""
    return f".{format}" if f".{format}" in WRITTEN_SUFFIXES else ".bin"


def highest(blocks: Iterable[np.ndarray]) -> int:
    """Highest id in any of the blocks; 0 if there is none."""
    return max((int(block.max(initial=0)) for block in blocks), default=0)
