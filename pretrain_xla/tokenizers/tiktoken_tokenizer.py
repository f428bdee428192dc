"""tiktoken's encodings, such as `gpt2`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tiktoken

from pretrain_xla.errors import UserError


@dataclass(frozen=True)
class TiktokenTokenizer:
    """One of tiktoken's encodings."""

    encoding: tiktoken.Encoding

    @property
    def name(self) -> str:
        """See `Tokenizer.name`."""
        return self.encoding.name

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self.encoding.n_vocab

    @property
    def end_of_text(self) -> int:
        """See `Tokenizer.end_of_text`."""
        return self.encoding.eot_token

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """See `Tokenizer.byte_ids`."""
        return tuple(self.encoding.encode_single_token(bytes([byte])) for byte in range(256))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        with self._explain_failure(text):
            return self.encoding.encode(text, disallowed_special=())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; tiktoken's threads release the GIL."""
        with self._explain_failure(max(texts, key=len, default="")):
            return self.encoding.encode_batch(list(texts), num_threads=os.cpu_count() or 1, disallowed_special=())

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` of well-formed text, as uint32 [tokens]."""
        with self._explain_failure(text):
            return self.encoding.encode_to_numpy(text, disallowed_special=())

    @contextlib.contextmanager
    def _explain_failure(self, text: str) -> Iterator[None]:
        """Some of tiktoken's regular expressions exceed its backtracking limit, as at a run of half a million spaces.

        `encode` then raises `ValueError`, but `encode_ordinary` panics, which is no `Exception`; so it is not used.
        """
        try:
            yield
        except ValueError as error:
            raise UserError(
                f"tokenizer {self.name!r}: cannot encode the document that begins {text.strip()[:40]!r} ({len(text):,} "
                f"characters): {str(error)[:100]}: remove it, or shorten its longest run of spaces"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self._bytes, map(int, ids))).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return b"\xff"
