"""A cache from pre-tokens to token ids, looked up for a whole array of pre-tokens at once.

Text repeats its words: after the first megabyte, all but a few of a thousand English pre-tokens are in the cache, and only
those few are encoded by the tokenizer itself. So the ids are the tokenizer's own, at the cost of a hash look-up.

Why not tiktoken's or `tokenizers`' own BPE: they encode one pre-token at a time, with a regular expression before it; see
`pre_tokenizer.py` for what both files save. A tokenizer that does not split as GPT-2 does is used as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pretrain_xla.tokenizers.pre_tokenizer import BORDER_BYTE, PreTokenizer

LONGEST_KEY = 15  # bytes of a pre-token in the cache: two 64-bit words, less a byte for the length
_SLOT_BITS = 20  # 25 MB of slots; the cache is cleared when more than half are used
_COUNT_BITS = 32  # a value is the offset of a pre-token's ids in the pool, and their count
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xD6E8FEB86659FD93))
# Masks of the bytes of a pre-token by its length, for the first and the second word; longer ones have no key.
_FIRST_MASK = np.array([2 ** (8 * min(n, 8)) - 1 for n in range(LONGEST_KEY + 2)], np.uint64)
_SECOND_MASK = np.array([2 ** (8 * max(n - 8, 0)) - 1 for n in range(LONGEST_KEY + 1)] + [0], np.uint64)


class TokenCache:
    """Encodes documents by looking up their pre-tokens.

    Args:
        pre_tokenizer: splits documents as the tokenizer does.
        encode_pre_tokens: the tokenizer, for single pre-tokens: all their ids concatenated, and how many each has.
        known: pre-tokens whose id is known beforehand.
        end_of_text: id of the border after each document.
    """

    def __init__(
        self,
        pre_tokenizer: PreTokenizer,
        encode_pre_tokens: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
        known: Mapping[bytes, int],
        end_of_text: int,
    ) -> None:
        self._pre_tokenizer, self._encode_pre_tokens = pre_tokenizer, encode_pre_tokens
        self._known = {text: token for text, token in known.items() if len(text) <= LONGEST_KEY}
        self._known[bytes([BORDER_BYTE])] = end_of_text
        self._pool_size = self._kept = self._filled = 0
        self._clear()

    def encode(self, raw: bytes) -> np.ndarray:
        """Ids of documents, with end-of-text after each: [tokens] uint32.

        Args:
            raw: documents in well-formed UTF-8, each followed by `BORDER_BYTE`.
        """
        raw_N = np.frombuffer(raw + bytes(16), np.uint8)
        starts_P = self._pre_tokenizer.starts(raw_N[:-16])
        ends_P = np.append(starts_P[1:], len(raw))
        first_P, second_P, has_key_P = _keys(raw_N, starts_P, ends_P - starts_P)
        values_P = self._look_up(first_P, second_P, has_key_P)
        missing = np.flatnonzero(values_P == 0)
        size = self._pool_size
        if len(missing):
            self._learn(raw, starts_P, ends_P, first_P, second_P, has_key_P, missing, values_P)
        ids = self._expand(values_P)
        if not has_key_P.all():
            self._pool_size = max(
                size, self._kept
            )  # drop the ids of those that have no key: they cannot be found again
        if self._filled > 2 ** (_SLOT_BITS - 1):
            self._clear()
        return ids

    def _clear(self) -> None:
        """Forget everything but the known pre-tokens."""
        slots = 2**_SLOT_BITS
        self._first, self._second = np.zeros(slots, np.uint64), np.zeros(slots, np.uint64)
        self._values = np.zeros(slots, np.int64)  # 0: an empty slot
        self._pool, self._pool_size, self._filled = np.zeros(2**16, np.uint32), 1, 0
        known = list(self._known)
        raw_N = np.frombuffer(b"".join(known) + bytes(16), np.uint8)
        lengths_P = np.array([len(text) for text in known])
        first_P, second_P, _ = _keys(raw_N, np.cumsum(lengths_P) - lengths_P, lengths_P)
        ids_P = np.array(list(self._known.values()), np.uint32)
        self._insert(first_P, second_P, self._store(ids_P, np.ones(len(known), np.int64)))
        self._kept = self._pool_size

    def _look_up(self, first_P: np.ndarray, second_P: np.ndarray, has_key_P: np.ndarray) -> np.ndarray:
        """Value of each pre-token; 0 where it is not in the cache."""
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
        """Encode the pre-tokens that are not in the cache, insert those that have a key, and fill in the values of all."""
        spans = zip(starts_P[missing].tolist(), ends_P[missing].tolist(), strict=True)
        texts = [raw[start:end] for start, end in spans]
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        which = np.array([number[text] for text in texts])
        ids, counts = self._encode_pre_tokens([text.decode() for text in number])
        example = np.zeros(len(number), np.int64)
        example[which] = missing
        keyed = has_key_P[example]
        values = np.zeros(len(number), np.int64)
        # Those with a key are stored first, so that the rest can be dropped from the end of the pool.
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
        """Insert new pre-tokens; where several hash to one slot, one gets it and the rest try the next."""
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
    """The bytes of each pre-token as two words, with its length in the last byte, and whether it is short enough for that.

    Args:
        raw_N: [bytes + 16] uint8: text, and padding to read past its end.
        starts_P: [pre-tokens] offset of each.
        lengths_P: [pre-tokens] bytes of each.
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
