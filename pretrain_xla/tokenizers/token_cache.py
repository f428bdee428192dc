"""Pieces of text → token ids by a table of the pieces met so far, looked up for a whole array of pieces at once.

Text repeats its words: of a thousand pieces of English all but a few are in the table after the first megabyte, and only
those few are given to the tokenizer itself. So the ids are the tokenizer's own, at the price of a hash look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pretrain_xla.tokenizers.pre_tokenizer import BORDER_BYTE, PieceCutter

LONGEST_KEY = 15  # bytes of a piece in the table: two machine words, less a byte for the length
_SLOT_BITS = 20  # 25 MB of slots, of which at most half are filled
_COUNT_BITS = 32  # a value is where a piece's ids begin in the pool, and how many there are
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xD6E8FEB86659FD93))
# Masks of the bytes of a piece by its length, for the first and the second word; longer pieces have no key.
_FIRST_MASK = np.array([2 ** (8 * min(n, 8)) - 1 for n in range(LONGEST_KEY + 2)], np.uint64)
_SECOND_MASK = np.array([2 ** (8 * max(n - 8, 0)) - 1 for n in range(LONGEST_KEY + 1)] + [0], np.uint64)


class PieceTable:
    """Encodes documents by their pieces.

    Args:
        cutter: cuts documents as the tokenizer does.
        encode_pieces: the tokenizer, for single pieces: their ids, one after the other, and how many each has.
        known: pieces whose ids need not be asked for.
        end_of_text: id for the border after each document.
    """

    def __init__(
        self,
        cutter: PieceCutter,
        encode_pieces: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
        known: Mapping[bytes, int],
        end_of_text: int,
    ) -> None:
        self._cutter, self._encode_pieces = cutter, encode_pieces
        self._known = {piece: token for piece, token in known.items() if len(piece) <= LONGEST_KEY}
        self._known[bytes([BORDER_BYTE])] = end_of_text
        self._pool_size = self._kept = self._filled = 0
        self._clear()

    def encode(self, raw: bytes) -> np.ndarray:
        """Ids of documents, with end-of-text after each: [tokens] uint32.

        Args:
            raw: documents in well-formed UTF-8, each followed by `BORDER_BYTE`.
        """
        raw_N = np.frombuffer(raw + bytes(16), np.uint8)
        starts_P = self._cutter.starts(raw_N[:-16])
        ends_P = np.append(starts_P[1:], len(raw))
        first_P, second_P, has_key_P = _keys(raw_N, starts_P, ends_P - starts_P)
        values_P = self._look_up(first_P, second_P, has_key_P)
        missing = np.flatnonzero(values_P == 0)
        size = self._pool_size
        if len(missing):
            self._learn(raw, starts_P, ends_P, first_P, second_P, has_key_P, missing, values_P)
        ids = self._expand(values_P)
        if not has_key_P.all():
            self._pool_size = max(size, self._kept)  # what has no key cannot be found again
        if self._filled > 2 ** (_SLOT_BITS - 1):
            self._clear()
        return ids

    def _clear(self) -> None:
        """Forget everything but the known pieces."""
        slots = 2**_SLOT_BITS
        self._first, self._second = np.zeros(slots, np.uint64), np.zeros(slots, np.uint64)
        self._values = np.zeros(slots, np.int64)  # 0: an empty slot
        self._pool, self._pool_size, self._filled = np.zeros(2**16, np.uint32), 1, 0
        pieces = list(self._known)
        raw_N = np.frombuffer(b"".join(pieces) + bytes(16), np.uint8)
        lengths_P = np.array([len(piece) for piece in pieces])
        first_P, second_P, _ = _keys(raw_N, np.cumsum(lengths_P) - lengths_P, lengths_P)
        ids_P = np.array(list(self._known.values()), np.uint32)
        self._insert(first_P, second_P, self._store(ids_P, np.ones(len(pieces), np.int64)))
        self._kept = self._pool_size

    def _look_up(self, first_P: np.ndarray, second_P: np.ndarray, has_key_P: np.ndarray) -> np.ndarray:
        """Value of each piece; 0 where it is not in the table."""
        slots_P = _slots(first_P, second_P)
        values_P = self._values[slots_P]
        same_P = (self._first[slots_P] == first_P) & (self._second[slots_P] == second_P)
        open_Q = np.flatnonzero(~same_P & (values_P != 0))
        values_P[~(same_P & has_key_P)] = 0
        open_Q = open_Q[has_key_P[open_Q]]
        slots_Q = slots_P[open_Q]
        while len(open_Q):
            slots_Q = (slots_Q + 1) & (2**_SLOT_BITS - 1)
            found_Q = self._values[slots_Q]
            same_Q = (self._first[slots_Q] == first_P[open_Q]) & (self._second[slots_Q] == second_P[open_Q])
            values_P[open_Q[same_Q]] = found_Q[same_Q]
            more_Q = ~same_Q & (found_Q != 0)
            open_Q, slots_Q = open_Q[more_Q], slots_Q[more_Q]
        return values_P

    def _learn(
        self,
        raw: bytes,
        starts_P: np.ndarray,
        ends_P: np.ndarray,
        first_P: np.ndarray,
        second_P: np.ndarray,
        has_key_P: np.ndarray,
        missing: np.ndarray,
        values_P: np.ndarray,
    ) -> None:
        """Ask the tokenizer for the pieces that are not in the table, put in those that fit, and fill in their values."""
        spans = zip(starts_P[missing].tolist(), ends_P[missing].tolist(), strict=True)
        pieces = [raw[start:end] for start, end in spans]
        number = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        which = np.array([number[piece] for piece in pieces])
        ids, counts = self._encode_pieces([piece.decode() for piece in number])
        example = np.zeros(len(number), np.int64)
        example[which] = missing
        keyed = has_key_P[example]
        values = np.zeros(len(number), np.int64)
        # Those that are kept go first, so that the rest can be cut off the pool again.
        kept = np.repeat(keyed, counts)
        values[keyed] = self._store(ids[kept], counts[keyed])
        self._insert(first_P[example[keyed]], second_P[example[keyed]], values[keyed])
        self._kept = self._pool_size
        values[~keyed] = self._store(ids[~kept], counts[~keyed])
        values_P[missing] = values[which]

    def _store(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Append ids to the pool; returns the values that point to them, one for each count."""
        begin, end = self._pool_size, self._pool_size + len(ids)
        if end > len(self._pool):
            self._pool = np.concatenate([self._pool, np.zeros(end, np.uint32)])
        self._pool[begin:end], self._pool_size = ids, end
        return ((begin + np.cumsum(counts) - counts) << _COUNT_BITS) | counts

    def _insert(self, first_P: np.ndarray, second_P: np.ndarray, values_P: np.ndarray) -> None:
        """Put in pieces that are not there; of those that want one slot, one gets it and the rest try the next."""
        self._filled += len(values_P)
        slots_P = _slots(first_P, second_P)
        while len(slots_P):
            free = np.flatnonzero(self._values[slots_P] == 0)
            taken, chosen = np.unique(slots_P[free], return_index=True)
            chosen = free[chosen]
            self._first[taken], self._second[taken] = first_P[chosen], second_P[chosen]
            self._values[taken] = values_P[chosen]
            left = np.ones(len(slots_P), bool)
            left[chosen] = False
            first_P, second_P, values_P = first_P[left], second_P[left], values_P[left]
            slots_P = (slots_P[left] + 1) & (2**_SLOT_BITS - 1)

    def _expand(self, values_P: np.ndarray) -> np.ndarray:
        counts_P, offsets_P = values_P & (2**_COUNT_BITS - 1), values_P >> _COUNT_BITS
        ends_P = np.cumsum(counts_P)
        total = int(ends_P[-1]) if len(ends_P) else 0
        if total == len(values_P) and counts_P.min(initial=1) == 1:
            return self._pool[offsets_P]
        return self._pool[np.repeat(offsets_P - ends_P + counts_P, counts_P) + np.arange(total)]


def _keys(raw_N: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of each piece in two words, its length in the last byte, and whether it is short enough for that.

    Args:
        raw_N: [bytes + 16] uint8: text and some more, to read past its end.
        starts_P: [pieces] where each begins.
        lengths_P: [pieces] bytes of each.
    """
    words = np.ndarray((len(raw_N) - 7,), np.uint64, raw_N, strides=(1,))  # one at each byte, aligned or not
    has_key_P = lengths_P <= LONGEST_KEY
    clipped_P = np.minimum(lengths_P, LONGEST_KEY + 1)
    first_P = words[starts_P] & _FIRST_MASK[clipped_P]
    second_P = words[starts_P + 8] & _SECOND_MASK[clipped_P]
    return first_P, second_P | (clipped_P.astype(np.uint64) << np.uint64(56)), has_key_P


def _slots(first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    mixed_P = first_P * _MULTIPLIERS[0] ^ second_P * _MULTIPLIERS[1]
    mixed_P ^= mixed_P >> np.uint64(32)
    return ((mixed_P * _MULTIPLIERS[2]) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
