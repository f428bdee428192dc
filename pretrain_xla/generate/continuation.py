"""The continuation of a batch of texts, token by token: which call of the decoder comes next.

The first call is a prefill; the following ones decode 1, 2, 4 … tokens at once, so that the first tokens appear early and
later calls are few. When a text has filled its window (`window.py`) or the cache is full, all texts are prefilled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pretrain_xla.generate.decoder import MOST_TOKENS, Choice, Decoder
from pretrain_xla.generate.sampling import Sampling, draws
from pretrain_xla.generate.window import window_start


@dataclass(frozen=True)
class Request:
    """How to continue a text.

    Attributes:
        max_new_tokens: upper limit of new tokens.
        sampling: how to choose them.
        seed: seed of the random numbers.
        stops: ids that end a text; they are not returned.
        cached: use the key/value cache. Without it, each token needs a prefill of the whole window (for comparison).
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 42
    stops: tuple[int, ...] = ()
    cached: bool = True


class Continuation:
    """An iterable of `(row, token)`, as they are generated. `end(row)` ends a row early."""

    def __init__(self, decoder: Decoder, texts: Sequence[Sequence[int]], request: Request) -> None:
        assert all(texts), "each text needs a token to begin with"
        self._decoder, self._request = decoder, request
        self._texts = [list(text) for text in texts]
        self._alive = [True] * len(texts)
        self._made = 0
        self._seq_length = decoder.model.config.seq_length
        self._chance_NB = draws(request.seed, len(texts), request.max_new_tokens)

    def end(self, row: int) -> None:
        """Generate no more tokens for this row."""
        self._alive[row] = False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Generate the tokens."""
        while self._goes_on():
            tokens_B = self._read_texts()
            yield from self._take(tokens_B)
            iterations = 1
            while self._goes_on() and (room := self._room()):
                iterations = min(iterations, room, MOST_TOKENS)
                chance_NB = self._chance_NB[self._made : self._made + iterations]
                for tokens_B in self._decoder.decode(iterations, self._alive, chance_NB):
                    yield from self._take(tokens_B)
                iterations *= 2

    def _goes_on(self) -> bool:
        return any(self._alive) and self._made < self._request.max_new_tokens

    def _start(self, row: int) -> int:
        """Start of a row's window; for an ended row, its last token is enough."""
        length = len(self._texts[row])
        return window_start(length, self._seq_length) if self._alive[row] else length - 1

    def _read_texts(self) -> list[int]:
        request, rows = self._request, range(len(self._texts))
        self._starts = [self._start(row) for row in rows]
        windows = [self._texts[row][self._starts[row] :] for row in rows]
        more = request.max_new_tokens - self._made - 1 if request.cached else 0
        return self._decoder.prefill(windows, self._choice(), self._chance_NB[self._made], more=more)

    def _choice(self) -> Choice:
        sampling = self._request.sampling
        seen_BV = None
        if sampling.rules.penalizes:
            seen_BV = torch.zeros(len(self._texts), self._decoder.choices, dtype=torch.bool)
            for row, text in enumerate(self._texts):
                seen_BV[row, text] = True
        stops = sorted({*self._request.stops}) or [-1]
        return Choice(sampling.rules, sampling.numbers(), torch.tensor(stops, dtype=torch.int32), seen_BV)

    def _room(self) -> int:
        """Tokens that can follow before an active row's window moves, the cache is full, or the limit is reached."""
        windows = [len(text) - start for text, start in zip(self._texts, self._starts, strict=True)]
        longest = max(window for window, alive in zip(windows, self._alive, strict=True) if alive)
        left = self._request.max_new_tokens - self._made
        return min(self._seq_length + 1 - longest, self._decoder.slots_left, left)

    def _take(self, tokens_B: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Append a token to each active row, and yield it."""
        self._made += 1
        for row, token in enumerate(tokens_B):
            if not self._alive[row]:
                continue
            self._texts[row].append(token)
            if token in self._request.stops:
                self.end(row)
            else:
                yield row, token
