"""The context window of a long text, and padded lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.generate.window import bucket, window_start


@given(length=st.integers(1, 5000), seq_length=st.integers(1, 600))
def test_the_window_is_at_least_half_full_and_moves_only_when_it_is_full(length: int, seq_length: int) -> None:
    start = window_start(length, seq_length)
    assert 0 < length - start <= seq_length
    assert start == 0 or length - start > seq_length - max(seq_length // 2, 1)
    moved = window_start(length + 1, seq_length) - start
    assert moved == (max(seq_length // 2, 1) if length - start == seq_length else 0)


@given(length=st.integers(1, 5000), limit=st.integers(1, 5000))
def test_buckets_are_few_and_large_enough(length: int, limit: int) -> None:
    size = bucket(min(length, limit), limit)
    assert min(length, limit) <= size <= limit
    assert size == limit or (size >= 32 and size & (size - 1) == 0)
    assert bucket(min(length + 1, limit), limit) >= size
