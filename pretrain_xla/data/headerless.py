"""Files of ids without a header: the width of their ids, and whether they are ids at all.

A file without a header could be anything, so its first bytes decide. Ids in 32 or 64 bits are recognised by their upper
halves, which are all close to zero. Other files are recognised by the magic numbers of their formats. So is text: read as ids
of 16 bits, it would be a stream of ids that most vocabularies have.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

import numpy as np

_ENOUGH = 256  # numbers of 16 bits that suffice for a decision
_HIGHEST_HALF = 3  # the upper half of an id of 32 bits: vocabularies have up to 262,144 ids
_MAGICS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), what)
    for pattern, what in (
        (rb"PK\x03\x04", "a zip file, as torch.save and np.savez write"),
        (
            rb"\x80[\x04\x05]\x95.{5}\0\0\0|\x80\x02(\x8a\x0al\xfc\x9cF|[}\]]q\0)",
            "a pickle, as older versions of torch.save write",
        ),
        (rb"\x1f\x8b\x08", "compressed with gzip"),
        (rb"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (rb"\xfd7zXZ\0", "compressed with xz"),
        (rb"BZh[1-9]1AY&SY", "compressed with bzip2"),
        (rb".{5}\0\0\0\{\"", "a safetensors file"),
        (rb"GGUF|ggml|lmgg|tjgg", "weights of llama.cpp"),
        (rb"\x89HDF\r\n", "HDF5"),
        (rb"ARROW1|\xff\xff\xff\xff.{3}\0\x10\0\0\0", "Arrow"),
        (rb"MMIDIDX\0\0", "the index of a Megatron dataset"),
        (rb"\x7fELF", "a program"),
        (rb"\x89PNG\r\n|\xff\xd8\xff[\xdb-\xef]|%PDF-", "a picture or PDF"),
        (rb"SQLite format 3", "a database"),
    )
)


def what_else(head: bytes) -> str | None:
    """What other kind of file this is, by its first bytes. None means that it may hold ids."""
    for magic, what in _MAGICS:
        if magic.match(head):
            return what
    if len(head) >= 64 and not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", head):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            return None
        return "text, not token ids"
    return None


def dtype_of(head: bytes) -> np.dtype[Any]:
    """The type of the ids in a file without a header, by its first bytes: uint16 unless they are recognisably wider."""
    halves = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if len(halves) < _ENOUGH or not halves[1::2].max() <= _HIGHEST_HALF < halves[::2].max():
        return np.dtype("<u2")
    return np.dtype("<u4" if halves[2::4].any() or halves[3::4].any() else "<i8")


def looks_like_ids(head: bytes) -> bool:
    """Whether first bytes look like ids: wide ones with empty upper halves, or many that repeat, as in text and unlike in
    random numbers."""
    dtype = dtype_of(head)
    ids = np.frombuffer(head[: len(head) // 8 * 8], dtype)
    return dtype.itemsize > 2 or (len(ids) >= _ENOUGH and len(np.unique(ids)) < 0.9 * len(ids))
