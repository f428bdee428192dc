"""The context window of a text longer than the model's `seq_length`, and padded lengths.

When a text fills the window, the window moves on by half its length, and its content is prefilled again from position 0. So
each token sees at least half a window, texts can have any length, and each token is processed twice on average. The window's
start depends on the text's length only: it is the same with and without cache, alone and in a batch.
"""

from __future__ import annotations

SMALLEST_BUCKET = 32


def window_start(length: int, seq_length: int) -> int:
    """Index of the first token in the window when the model predicts the token after `length` tokens."""
    hop = max(seq_length // 2, 1)
    return -(-max(length - seq_length, 0) // hop) * hop


def bucket(length: int, seq_length: int) -> int:
    """Padded size for `length` tokens: a power of two, at most `seq_length`, so that few graphs serve all lengths."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, seq_length)
