"""From strings to rows: the tokens that a model is given, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pretrain_xla.evaluate.scorer import Row
from pretrain_xla.tokenizers.tokenizer import Tokenizer


def joined_rows(
    contexts: Sequence[str],
    continuations: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    before: Sequence[int] = (),
) -> list[Row]:
    """As in lm-eval: each pair is tokenized as one string, and scored from where the context's own tokens end.

    Trailing spaces of a context belong to the continuation. An empty context is an end-of-text token. A pair longer than the
    model is truncated on the left.

    Args:
        contexts: not scored.
        continuations: scored.
        tokenizer: the model's.
        max_length: the model's `seq_length`.
        before: ids that the model expects before every text.
    """
    stripped = [context.rstrip() for context in contexts]
    wholes = tokenizer.encode_batch([a + b for a, b in zip(contexts, continuations, strict=True)])
    distinct = list(dict.fromkeys(stripped))
    lengths = dict(zip(distinct, map(len, tokenizer.encode_batch(distinct)), strict=True))
    rows = []
    for context, kept, whole in zip(contexts, stripped, wholes, strict=True):
        if context and len(whole) > 1:
            # If the context's tokens cover the whole pair, the last token is scored.
            start = len(before) + min(lengths[kept], len(whole) - 1)
            rows.append(cut([*before, *whole], start, max_length))
        else:
            first = before or [tokenizer.end_of_text]
            rows.append(cut([*first, *whole], len(first), max_length))
    return rows


def separate_rows(
    contexts: Sequence[str], continuations: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[Row]:
    """As in llm.c: context and continuation are tokenized separately. An empty context is an end-of-text token."""
    pairs = zip(tokenizer.encode_batch(contexts), tokenizer.encode_batch(continuations), strict=True)
    befores = ((context or [tokenizer.end_of_text], continuation) for context, continuation in pairs)
    return [cut(before + continuation, len(before), max_length) for before, continuation in befores]


def cut(tokens: Sequence[int], start: int, max_length: int) -> Row:
    """A row that is truncated on the left to the model's length; of a continuation longer than that, only the last
    `max_length` tokens are scored."""
    excess = max(len(tokens) - (max_length + 1), 0)
    return Row(np.array(tokens[excess:], np.int32), max(start - excess, 1), excess)


def windows(tokens: np.ndarray, max_length: int, stride: int) -> Iterator[Row]:
    """Windows of `max_length` tokens over a long text, `stride` apart; in each, the tokens not in an earlier one are scored.

    Each token is scored once, with at least `max_length - stride` tokens before it (except in the first window). The first
    token of the text is not scored, nor, with stride = max_length, the first of each window.
    """
    seen = 0
    for begin in range(0, len(tokens), stride):
        window = tokens[begin : begin + max_length]
        start = max(len(window) - (begin + len(window) - seen), 1)
        if start < len(window):
            yield Row(np.asarray(window, np.int32), start)
        seen = begin + len(window)
        if seen == len(tokens):
            return
