"""Which part of a text the model sees, and in which sizes it is run.

A model knows `seq_length` positions. A text may grow beyond that: when it fills the window, the window moves on by half its
length, and what is then in it is read anew from position 0. So a token sees at least the half window before it, a text of any
length can be written, and the tokens are read twice on average instead of once each. Where the window stands depends on the
text's length alone: the same with and without a cache, alone and in a batch.
"""

from __future__ import annotations

SMALLEST_BUCKET = 32


def window_start(length: int, seq_length: int) -> int:
    """Index of the first token of a text that the model sees when it predicts what follows `length` tokens."""
    hop = max(seq_length // 2, 1)
    return -(-max(length - seq_length, 0) // hop) * hop


def bucket(length: int, seq_length: int) -> int:
    """The padded size for `length` tokens: a power of two, or `seq_length`; so a handful of graphs serves every length."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, seq_length)
