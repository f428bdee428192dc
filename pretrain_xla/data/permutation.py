"""A shuffle that needs no memory: a keyed bijection on 0..n-1, computed one position at a time.

A Feistel network (Luby and Rackoff 1988) permutes the smallest power of two that holds n. A result outside n is permuted
again until it falls inside (cycle walking, Black and Rogaway 2002), less than once more on average. It is plain integer
arithmetic, so its order does not depend on the version of NumPy: a run resumed in ten years sees the same batches.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def key_of(*words: int) -> int:
    """A 64-bit hash of the words in their order."""
    state = 0
    for word in words:
        state = (state ^ word) + _GOLDEN & _MASK
        state = (state ^ state >> 30) * _FIRST & _MASK
        state = (state ^ state >> 27) * _SECOND & _MASK
        state ^= state >> 31
    return state


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """The new place of each position: a bijection on 0..size-1 that depends on the key.

    Args:
        positions: int64 array, each 0 <= p < size.
        size: number of positions, at least 1.
        key: see `key_of`.

    Returns:
        int64 array of the same shape.
    """
    bits = max((size - 1).bit_length(), 2)
    keys = [np.uint64(key_of(key, number)) for number in range(_ROUNDS)]
    out = _feistel(positions.astype(np.uint64), bits, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], bits, keys)
    return out.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Each half in turn is combined with a hash of the other. That can be inverted, so it is a bijection on `bits` bits."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    low, high = values & np.uint64(2**low_bits - 1), values >> np.uint64(low_bits)
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ _hash(high, key, low_bits)
        else:
            high = high ^ _hash(low, key, high_bits)
    return high << np.uint64(low_bits) | low


def _hash(values: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    mixed = (values ^ key) * np.uint64(_FIRST)
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(_SECOND)
    return mixed >> np.uint64(64 - bits)
