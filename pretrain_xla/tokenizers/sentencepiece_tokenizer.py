"""SentencePiece models, by the library itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import sentencepiece

from pretrain_xla.storage.files import filesystem, write_atomically
from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers.tokenizer import SENTENCEPIECE_FILE, no_byte_tokens, refuse_other_tokenizer


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece `.model`. `decode` returns the text as the model normalises it: Llama's drops the first space, say."""

    name: str
    model: sentencepiece.SentencePieceProcessor
    end_of_text: int

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self.model.get_piece_size()

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """See `Tokenizer.byte_ids`."""
        ids = tuple(self.model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        if not all(map(self.model.is_byte, ids)):
            raise no_byte_tokens(self.name)
        return ids

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.model.encode(well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return self.model.encode([well_formed(text) for text in texts], num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; control tokens are shown by name, as other tokenizers show them."""
        parts: list[str] = []
        for special, group in itertools.groupby(map(int, ids), key=self._shown_as):
            tokens = list(group)
            parts.append(self.model.decode(tokens) if special is None else special * len(tokens))
        return "".join(parts)

    def _shown_as(self, token: int) -> str | None:
        """How an id that is not text is shown; None for ids of text."""
        if not 0 <= token < self.vocab_size:
            return "\ufffd"
        return self.model.id_to_piece(token) if self.model.is_control(token) else None

    @property
    def file_name(self) -> str:
        """See `StoredTokenizer.file_name`."""
        return SENTENCEPIECE_FILE

    @property
    def content(self) -> bytes:
        """See `StoredTokenizer.content`."""
        return self.model.serialized_model_proto()

    def save(self, folder: str) -> None:
        """Write `tokenizer.model`, byte for byte.

        Raises:
            UserError: the folder cannot be written.
        """
        fs, root = filesystem(folder)
        refuse_other_tokenizer(fs, root, SENTENCEPIECE_FILE)
        write_atomically(fs, f"{root}/{SENTENCEPIECE_FILE}", [self.content])
