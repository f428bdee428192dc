"""GPT-2's pre-tokenizer, which splits text before BPE, as array operations instead of a regular expression.

The regular expression is `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s`. Whether a pre-token
begins at a character depends only on that character, the two before it and the two after it. So comparing a few shifted arrays
of character classes finds all pre-tokens of many documents at once.

Why not tiktoken or `tokenizers`: on English text, most of their time goes into the regular expression. With this file and
`token_cache.py`, `prepare` gives the same ids at 1.7 times the speed of a tiktoken loop and 11 times that of `tokenizers`
(docs/LOG.md, "Tokenization").

Which characters are letters, numbers and white space depends on a tokenizer's Unicode version, so the tokenizer is asked once
for each character that occurs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LETTER, NUMBER, OTHER, SPACE, BORDER = range(5)
"""Classes of characters; BORDER is the class of the byte after each document."""
BORDER_BYTE = 0xFF  # never occurs in UTF-8
_UNKNOWN = 255
_APOSTROPHE, _SPACE_BYTE = ord("'"), ord(" ")


class PreTokenizer:
    """Splits documents into pre-tokens; caches the class of each character.

    Args:
        classify: class of a character (one of the first four), by the regular expression that this class replaces.
    """

    def __init__(self, classify: Callable[[str], int]) -> None:
        self._classify = classify
        self._class_of_byte = np.full(256, OTHER, np.uint8)
        self._class_of_byte[:128] = [classify(chr(code)) for code in range(128)]
        self._class_of_byte[BORDER_BYTE] = BORDER
        self._class_of_code: np.ndarray | None = (
            None  # one byte for each code point; made for the first that is not ASCII
        )

    def starts(self, raw_N: np.ndarray) -> np.ndarray:
        """Offset of each pre-token; a border is a pre-token of its own.

        Args:
            raw_N: [bytes] uint8: documents in well-formed UTF-8, each followed by `BORDER_BYTE`.
        """
        count = len(raw_N)
        # Two borders before and two after, so that every byte has neighbours. All bytes of a character have its class.
        class_N = np.full(count + 4, BORDER, np.uint8)
        class_N[2:-2] = self._class_of_byte[raw_N]
        inside_N = None
        if raw_N.max(initial=0, where=raw_N < BORDER_BYTE) >= 128:
            inside_N = (raw_N & 0xC0) == 0x80
            self._classify_non_ascii(raw_N, class_N[2:-2])
        here_N, before_N, after_N = class_N[2:-2], class_N[1:-3], class_N[3:-1]
        space_N = raw_N == _SPACE_BYTE
        space_before_N = np.zeros(count, bool)
        space_before_N[1:] = space_N[:-1]
        # A space belongs to the letters, numbers or signs after it; other white space before them does not.
        start_N = (here_N != before_N) & ~(space_before_N & (here_N < SPACE))
        # The last white space of a run is on its own, or belongs to what follows; unless the document ends there.
        if inside_N is None:
            start_N |= (here_N == SPACE) & (after_N < SPACE)
        else:
            self._last_spaces(here_N, after_N, inside_N, start_N)
        start_N |= here_N == BORDER
        self._contractions(raw_N, before_N, space_before_N, here_N, start_N)
        if inside_N is not None:
            start_N &= ~inside_N
        return np.flatnonzero(start_N)

    @staticmethod
    def _last_spaces(here_N: np.ndarray, after_N: np.ndarray, inside_N: np.ndarray, start_N: np.ndarray) -> None:
        """Mark the last white space of each run, at its first byte."""
        last = np.flatnonzero((here_N == SPACE) & (after_N < SPACE))
        while (within := inside_N[last]).any():
            last = last - within
        start_N[last] = True

    @staticmethod
    def _contractions(
        raw_N: np.ndarray, before_N: np.ndarray, space_before_N: np.ndarray, here_N: np.ndarray, start_N: np.ndarray
    ) -> None:
        """Join `'s`, `'d`, `'m`, `'t`, `'ll`, `'ve`, `'re` at the start of a pre-token, and split off what follows."""
        at = np.flatnonzero((raw_N == _APOSTROPHE) & (before_N != OTHER) & ~space_before_N)
        at = at[at + 2 < len(raw_N)]  # nearer to the end, only the border can follow
        one, two = raw_N[at + 1], raw_N[at + 2]
        short = (one == ord("s")) | (one == ord("d")) | (one == ord("m")) | (one == ord("t"))
        long = ((one == ord("l")) & (two == ord("l"))) | (((one == ord("v")) | (one == ord("r"))) & (two == ord("e")))
        start_N[at[short | long] + 1] = False
        for found, length in ((at[short], 2), (at[long], 3)):
            following = found + length
            start_N[following[here_N[following] == LETTER]] = True

    def _classify_non_ascii(self, raw_N: np.ndarray, class_N: np.ndarray) -> None:
        """Fill in the class of each character outside ASCII, at each of its bytes."""
        if self._class_of_code is None:
            self._class_of_code = np.full(0x110000, _UNKNOWN, np.uint8)
        for lead, limit, length in ((0xC0, 0xE0, 2), (0xE0, 0xF0, 3), (0xF0, 0xF8, 4)):
            at = np.flatnonzero((raw_N >= lead) & (raw_N < limit))
            if not len(at):
                continue
            code = (raw_N[at] & (0xFF >> (length + 1))).astype(np.int32)
            for offset in range(1, length):
                code = (code << 6) | (raw_N[at + offset] & 0x3F)
            found = self._class_of_code[code]
            if (found == _UNKNOWN).any():
                for new in np.unique(code[found == _UNKNOWN]).tolist():
                    self._class_of_code[new] = self._classify(chr(new))
                found = self._class_of_code[code]
            for offset in range(length):
                class_N[at + offset] = found
