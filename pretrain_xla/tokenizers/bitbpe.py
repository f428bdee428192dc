"""BitBPE (arXiv 2506.07541): fewer tokens for Chinese, Japanese and Korean, without more merges.

A byte-level or byte-fallback tokenizer spells such a character, where it has no token for it, as three byte tokens. The first
byte carries little information (it is nearly always that of the character before), so the 24 bits are regrouped:

    b1 b2 b3  →  prefix b1 >> 2 (6 bits),  (b1 & 3) << 7 | b2 >> 1 (9 bits),  (b2 & 1) << 8 | b3 (9 bits)

A prefix stays in force until another one or end-of-text, and is not repeated. So such a character costs two tokens instead of
three, and one more where the prefix changes.

Three consecutive single-byte tokens are packed, of which the first is E0–EF and the others are 80–BF; nothing else changes.
Such triples cannot overlap, so they can all be found at once. `unpack(pack(ids))` is `ids` for every sequence of the base
tokenizer's ids, hence for every byte string, well-formed or not.

Where a sequence begins in the middle of a text, as a training window does, the prefix of its first characters is missing: each
pair of nine-bit tokens before the first prefix decodes to U+FFFD, and so does half a pair. A continuation of a text must be
decoded together with that text (`decode_after`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, remove, write_atomically
from pretrain_xla.tokenizers.tokenizer import BITBPE_FILE, Tokenizer, is_stored, refuse_other_tokenizer

NUM_PREFIX_TOKENS = (4, 8, 16, 32, 64)
"""Lead bytes E0–EF give four prefixes, 0x38–0x3B, which each of these numbers tells apart; 64 has an id for every six bits."""
_NINE_BIT_TOKENS = 512


@dataclass(frozen=True)
class BitBPETokenizer:
    """A tokenizer with packed byte tokens. Ids: the base's, then the prefixes, then 512 nine-bit tokens."""

    name: str
    base: Tokenizer
    num_prefix_tokens: int = 64

    def __post_init__(self) -> None:
        if self.num_prefix_tokens not in NUM_PREFIX_TOKENS:
            raise UserError(
                f"num_prefix_tokens={self.num_prefix_tokens}: give one of {', '.join(map(str, NUM_PREFIX_TOKENS))}"
            )
        if isinstance(self.base, BitBPETokenizer):
            raise UserError(f"tokenizer {self.base.name!r} is BitBPE already: give the tokenizer that it was made from")

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self._nine_bits + _NINE_BIT_TOKENS

    @property
    def end_of_text(self) -> int:
        """See `Tokenizer.end_of_text`."""
        return self.base.end_of_text

    @property
    def byte_ids(self) -> tuple[int, ...]:
        """See `Tokenizer.byte_ids`."""
        return self.base.byte_ids

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.pack(np.array(self.base.encode(text), np.uint32)).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return [self.pack(np.array(ids, np.uint32)).tolist() for ids in self.base.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        # An id that does not exist may be any number, and becomes a byte that is not UTF-8.
        known = [token if 0 <= token < self.vocab_size else self.byte_ids[0xFF] for token in map(int, ids)]
        return self.base.decode(self.unpack(np.array(known, np.uint32)).tolist())

    def pack(self, ids_N: np.ndarray) -> np.ndarray:
        """The base tokenizer's ids → BitBPE ids; no prefix is in force after an end-of-text.

        Args:
            ids_N: [tokens] uint32, ids of the base.
        """
        byte_N = np.full(len(ids_N) + 2, -1, np.int16)
        byte_N[:-2] = self._byte_of_id[ids_N]
        b1_N, b2_N, b3_N = byte_N[:-2], byte_N[1:-1], byte_N[2:]
        lead_N = b1_N >= 0xE0
        if not lead_N.any():
            return ids_N
        at = np.flatnonzero(lead_N & (b1_N < 0xF0) & (b2_N >> 6 == 0b10) & (b3_N >> 6 == 0b10))
        if not len(at):
            return ids_N
        b1, b2, b3 = (byte_N[at + offset].astype(np.uint32) for offset in range(3))
        document = np.cumsum(ids_N == self.end_of_text)[at]
        new = np.ones(len(at), bool)
        new[1:] = (b1[1:] >> 2 != b1[:-1] >> 2) | (document[1:] != document[:-1])
        packed_N, kept_N = ids_N.copy(), np.ones(len(ids_N), bool)
        packed_N[at] = self._prefixes + (b1 >> 2) % self.num_prefix_tokens
        packed_N[at + 1] = self._nine_bits + ((b1 & 3) << 7 | b2 >> 1)
        packed_N[at + 2] = self._nine_bits + ((b2 & 1) << 8 | b3)
        kept_N[at[~new]] = False
        return packed_N[kept_N]

    def unpack(self, ids_N: np.ndarray) -> np.ndarray:
        """BitBPE ids → the base tokenizer's; a nine-bit token with no prefix or no partner becomes the byte FF.

        Args:
            ids_N: [tokens] uint32, below `vocab_size`.
        """
        prefix_N = (ids_N >= self._prefixes) & (ids_N < self._nine_bits)
        nine_N = ids_N >= self._nine_bits
        position_N = np.arange(len(ids_N))
        run_N = np.maximum.accumulate(np.where(nine_N, -1, position_N)) + 1  # start of each run of nine-bit tokens
        first_N = nine_N & ((position_N - run_N) % 2 == 0) & np.append(nine_N[1:], False)[: len(ids_N)]
        in_force_N = np.maximum.accumulate(np.where(prefix_N | (ids_N == self.end_of_text), position_N, -1))
        whole_N = first_N & (in_force_N >= 0) & prefix_N[in_force_N]
        count_N = np.where(whole_N, 3, np.where(prefix_N, 0, 1))
        count_N[1:][first_N[:-1]] = 0
        unpacked = np.repeat(np.where(nine_N, np.uint32(self.byte_ids[0xFF]), ids_N), count_N)
        at = np.flatnonzero(whole_N)
        prefix = 0x38 + (ids_N[in_force_N[at]] - self._prefixes) % 4
        high, low = ids_N[at] - self._nine_bits, ids_N[at + 1] - self._nine_bits
        three = np.stack([prefix << 2 | high >> 7, (high & 0x7F) << 1 | low >> 8, low & 0xFF], axis=1)
        begin = (np.cumsum(count_N) - count_N)[at]
        unpacked[begin[:, None] + np.arange(3)] = np.array(self.byte_ids, np.uint32)[three]
        return unpacked

    @property
    def file_name(self) -> str:
        """See `StoredTokenizer.file_name`."""
        return BITBPE_FILE

    @property
    def content(self) -> bytes:
        """See `StoredTokenizer.content`."""
        base = self.base.content if is_stored(self.base) else self.base.name.encode()
        return base + str(self.num_prefix_tokens).encode()

    def save(self, folder: str) -> None:
        """Write the base's file, if it has one, and `bitbpe.json`, which makes the folder a BitBPE tokenizer.

        Raises:
            UserError: the folder cannot be written.
        """
        base = self.base.name
        fs, root = filesystem(folder)
        refuse_other_tokenizer(fs, root, BITBPE_FILE, *((self.base.file_name,) if is_stored(self.base) else ()))
        remove(fs, [f"{root}/{BITBPE_FILE}"])  # written again below: the base refuses to be saved next to it
        if is_stored(self.base):
            self.base.save(folder)
            base = self.base.file_name
        tree = {"base": base, "num_prefix_tokens": self.num_prefix_tokens}
        write_atomically(fs, f"{root}/{BITBPE_FILE}", [json.dumps(tree, indent=2).encode()])

    @property
    def _prefixes(self) -> int:
        return self.base.vocab_size

    @property
    def _nine_bits(self) -> int:
        return self.base.vocab_size + self.num_prefix_tokens

    @cached_property
    def _byte_of_id(self) -> np.ndarray:
        table = np.full(self.base.vocab_size, -1, np.int16)
        table[list(self.byte_ids)] = np.arange(256)
        return table
