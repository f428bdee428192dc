"""UTF-8 bytes as token ids: no vocabulary to learn or to download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class BytesTokenizer:
    """Bytes are ids 0–255, and end-of-text is 256; about four times as many tokens as GPT-2's."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int = 256
    byte_ids: tuple[int, ...] = tuple(range(256))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(well_formed(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; one core is enough."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        known = {self.end_of_text: END_OF_TEXT.encode()}
        raw = (bytes([token]) if 0 <= token < 256 else known.get(token, b"\xff") for token in map(int, ids))
        return b"".join(raw).decode(errors="replace")
