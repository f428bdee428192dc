"""Files of ids without a header: how wide the ids are, and files that are no ids at all.

A file without a header could be anything, so its first bytes have to speak for it. Ids of text in 32 or 64 bits show by their
upper halves, which are next to zero all along; what other programs put at the beginning of their files shows what
is no ids, and so does text, which read as ids of 16 bits would be a stream of ids that most vocabularies have.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

import numpy as np

_ENOUGH = 256  # numbers of 16 bits from which something can be seen
_HIGHEST_HALF = 3  # the upper half of an id of 32 bits: vocabularies have up to 262,144 ids
_MAGICS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), what)
    for pattern, what in (
        (rb"PK\x03\x04", "a zip file, as torch.save and np.savez write"),
        (
            rb"\x80[\x04\x05]\x95.{5}\0\0\0|\x80\x02(\x8a\x0al\xfc\x9cF|[}\]]q\0)",
            "a pickle, as torch.save wrote of old",
        ),
        (rb"\x1f\x8b\x08", "packed with gzip"),
        (rb"\x28\xb5\x2f\xfd", "packed with zstd"),
        (rb"\xfd7zXZ\0", "packed with xz"),
        (rb"BZh[1-9]1AY&SY", "packed with bzip2"),
        (rb".{5}\0\0\0\{\"", "a file of safetensors"),
        (rb"GGUF|ggml|lmgg|tjgg", "the weights of llama.cpp"),
        (rb"\x89HDF\r\n", "HDF5"),
        (rb"ARROW1|\xff\xff\xff\xff.{3}\0\x10\0\0\0", "Arrow"),
        (rb"MMIDIDX\0\0", "the index of a Megatron dataset"),
        (rb"\x7fELF", "a program"),
        (rb"\x89PNG\r\n|\xff\xd8\xff[\xdb-\xef]|%PDF-", "a picture or PDF"),
        (rb"SQLite format 3", "a database"),
    )
)


def what_else(head: bytes) -> str | None:
    """What a file is that is no ids, by its beginning; none where nothing speaks against ids."""
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
    """The type of the ids in a file that holds nothing else, by its beginning: uint16 unless they are seen to be wider."""
    halves = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if len(halves) < _ENOUGH or not halves[1::2].max() <= _HIGHEST_HALF < halves[::2].max():
        return np.dtype("<u2")
    return np.dtype("<u4" if halves[2::4].any() or halves[3::4].any() else "<i8")


def looks_like_ids(head: bytes) -> bool:
    """Whether a beginning speaks for ids by itself: wide ones with empty upper halves, or many that come again, as in
    text, and unlike numbers by chance."""
    dtype = dtype_of(head)
    ids = np.frombuffer(head[: len(head) // 8 * 8], dtype)
    return dtype.itemsize > 2 or (len(ids) >= _ENOUGH and len(np.unique(ids)) < 0.9 * len(ids))
