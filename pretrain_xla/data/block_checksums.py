"""Checksums of the blocks of a shard, which check a range of it without reading the rest.

A shard that is read by ranges is read in whole blocks. A sequence of 1,024 tokens takes 2 KB, and one or two blocks of 32 KB
are requested for it: as many requests, and seventeen times the bytes. Smaller blocks would make `dataset.json` larger: it has
320 KB of block checksums for a billion tokens. CRC-32 takes about a quarter of a second for each GB.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

BLOCK_BYTES = 2**15


def block_checksums(parts: Iterable[Any]) -> str:
    """CRC-32 of each `BLOCK_BYTES` of a file, the last block being shorter: little-endian, in base64.

    Args:
        parts: the content, in buffers of any size.
    """
    found, checksum, room = [], 0, BLOCK_BYTES
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            piece, view = view[:room], view[room:]
            checksum, room = zlib.crc32(piece, checksum), room - len(piece)
            if not room:
                found.append(checksum)
                checksum, room = 0, BLOCK_BYTES
    if room < BLOCK_BYTES:
        found.append(checksum)
    return base64.b64encode(np.array(found, "<u4").tobytes()).decode()


def decode(text: str, size: int) -> bytes | None:
    """The same as bytes. None means that they are not those of a file of `size` bytes."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == 4 * -(-size // BLOCK_BYTES) else None


def widened(begin: int, end: int, size: int) -> tuple[int, int]:
    """The whole blocks that a range of a file of `size` bytes lies in."""
    return begin // BLOCK_BYTES * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size)


def read_checked(read: Callable[[int, int], bytes], begin: int, end: int, checksums: bytes) -> bytes | None:
    """Read whole blocks, a second time if they do not have their checksums (a fault of the network). None: nor then.

    Args:
        read: returns the bytes from one position up to another.
        begin: position of the first block.
        end: position after the last one.
        checksums: from `decode`.
    """
    expected = np.frombuffer(checksums, "<u4")[begin // BLOCK_BYTES :].tolist()
    for _ in range(2):
        data = read(begin, end)
        view = memoryview(data)
        found = [zlib.crc32(view[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
        if found == expected[: len(found)]:
            return data
    return None
