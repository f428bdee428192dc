"""The kinds of tokenizers: plain bytes, tiktoken's encodings, Hugging Face's `tokenizer.json`, SentencePiece models.

Each is a thin layer over its library, with the manners that `Tokenizer` asks for: special strings in text are ordinary
text, ids that do not exist decode to U+FFFD, and text that no UTF-8 can hold is mended rather than refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, url, write_atomically
from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers.plain_text import NOT_IN_TEXT, encoder_of, without_chance

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE, SPECIALS_FILE = "tokenizer.json", "special_tokens_map.json"
SENTENCEPIECE_FILE, BITBPE_FILE = "tokenizer.model", "bitbpe.json"
TOKENIZER_FILES = (BITBPE_FILE, TOKENIZER_FILE, SENTENCEPIECE_FILE)
"""What makes a folder a tokenizer; the first that is there decides."""


@dataclass(frozen=True)
class BytesTokenizer:
    """UTF-8 bytes as ids 0–255, and end-of-text as 256: no vocabulary to learn, about four times as many tokens."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int = 256
    byte_ids: tuple[int, ...] = tuple(range(256))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(well_formed(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; one core is plenty."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        known = {self.end_of_text: END_OF_TEXT.encode()}
        raw = (bytes([token]) if 0 <= token < 256 else known.get(token, b"\xff") for token in map(int, ids))
        return b"".join(raw).decode(errors="replace")


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
        with self._refusing(text):
            return self.encoding.encode(text, disallowed_special=())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; tiktoken's threads run outside Python's lock."""
        with self._refusing(max(texts, key=len, default="")):
            return self.encoding.encode_batch(list(texts), num_threads=os.cpu_count() or 1, disallowed_special=())

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` of well-formed text, as uint32 [tokens]."""
        with self._refusing(text):
            return self.encoding.encode_to_numpy(text, disallowed_special=())

    @contextlib.contextmanager
    def _refusing(self, text: str) -> Iterator[None]:
        """tiktoken's regular expressions have an end to their patience: some at a run of half a million blanks.

        The `encode_ordinary` of tiktoken panics there, which is no `Exception`; its other ways to encode do not.
        """
        try:
            yield
        except ValueError as error:
            raise UserError(
                f"tokenizer {self.name!r}: cannot encode the document that begins {text.strip()[:40]!r} ({len(text):,} "
                f"characters): {str(error)[:100]}: take it out, or shorten its longest run of blanks"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return b"".join(map(self._bytes, map(int, ids))).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return b"\xff"


@dataclass(frozen=True)
class JsonTokenizer:
    """A Hugging Face `tokenizer.json`; `encoder` encodes, where text could forge special tokens with `tokenizer`."""

    name: str
    tokenizer: tokenizers.Tokenizer
    end_of_text: int
    encoder: tokenizers.Tokenizer | None = None

    @staticmethod
    def of(name: str, content: str, end_of_text: str) -> JsonTokenizer:
        """The tokenizer of a file's content, with our manners whatever the file says.

        Args:
            name: what `load_tokenizer` finds it by.
            content: JSON.
            end_of_text: the token that ends a document; it must be there.

        Raises:
            UserError: see `encoder_of`.
        """
        tokenizer = tokenizers.Tokenizer.from_str(content)
        # Declared special, and specials matched as ordinary text: without both, text could forge the border of a document.
        tokenizer.add_special_tokens([end_of_text])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        without_chance(tokenizer)
        token = tokenizer.token_to_id(end_of_text)
        assert token is not None
        return JsonTokenizer(name, tokenizer, token, encoder_of(name, tokenizer, end_of_text))

    def __reduce__(self) -> tuple[Any, ...]:
        # `tokenizers` forgets `encode_special_tokens` when it is pickled.
        return JsonTokenizer.of, (self.name, self.tokenizer.to_str(), self.tokenizer.id_to_token(self.end_of_text))

    @cached_property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`; ids need not be without gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """See `Tokenizer.byte_ids`: `<0xE3>` of byte fallback, or the characters that stand for bytes in a byte-level BPE."""
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        for names in (fallback, byte_level_names()):
            ids = [token for name in names if (token := self.tokenizer.token_to_id(name)) is not None]
            if len(ids) == len(names):
                return tuple(ids)
        raise _no_byte_tokens(self.name)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        with self._refusing():
            return (self.encoder or self.tokenizer).encode(self._clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        clean, encoder = [self._clean(text) for text in texts], self.encoder or self.tokenizer
        with self._refusing():
            return [encoding.ids for encoding in encoder.encode_batch_fast(clean, add_special_tokens=False)]

    def _clean(self, text: str) -> str:
        text = well_formed(text)
        return text.replace(NOT_IN_TEXT, "\ufffd") if self.encoder is not None else text

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; what a run of ids that do not exist becomes is the library's choice (nothing)."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        with self._refusing():
            return self.tokenizer.decode(known, skip_special_tokens=False)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """A regular expression that the library gives up on ends in a panic of Rust."""
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"tokenizer {self.name!r}: cannot go on ({' '.join(str(error).split())[:120]}): one of its regular expressions "
                "does not fit this text; take the text out, or another tokenizer"
            ) from None

    @property
    def file_name(self) -> str:
        """See `StoredTokenizer.file_name`."""
        return TOKENIZER_FILE

    @property
    def content(self) -> bytes:
        """See `StoredTokenizer.content`."""
        return f"{self.tokenizer.to_str()}{self.end_of_text}".encode()

    def save(self, folder: str) -> None:
        """Write `tokenizer.json`, and beside it which token ends a text, in the form that `transformers` reads too.

        Raises:
            UserError: the folder cannot be written.
        """
        fs, root = filesystem(folder)
        check_alone(fs, root, TOKENIZER_FILE)
        specials = {"eos_token": self.tokenizer.id_to_token(self.end_of_text)}
        write_atomically(fs, f"{root}/{TOKENIZER_FILE}", [self.tokenizer.to_str(pretty=True).encode()])
        write_atomically(fs, f"{root}/{SPECIALS_FILE}", [json.dumps(specials, indent=2).encode()])


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece `.model`, by the library itself.

    What comes back from `decode` is the text as the model normalises it: Llama's, say, takes the first space away.
    """

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
            raise _no_byte_tokens(self.name)
        return ids

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.model.encode(well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return self.model.encode([well_formed(text) for text in texts], num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; control tokens are shown by their names, as those of other tokenizers are."""
        parts: list[str] = []
        for special, group in itertools.groupby(map(int, ids), key=self._shown):
            tokens = list(group)
            parts.append(self.model.decode(tokens) if special is None else special * len(tokens))
        return "".join(parts)

    def _shown(self, token: int) -> str | None:
        """What an id is shown as when it is no part of the text."""
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
        check_alone(fs, root, SENTENCEPIECE_FILE)
        write_atomically(fs, f"{root}/{SENTENCEPIECE_FILE}", [self.content])


def check_alone(fs: Any, root: str, *own: str) -> None:
    """Refuse a folder that holds another kind of tokenizer: which one was meant could not be told.

    Raises:
        UserError: naming the file.
    """
    for file in TOKENIZER_FILES:
        if file not in own and fs.exists(f"{root}/{file}"):
            raise UserError(f"{url(fs, root)}: holds another tokenizer ({file}): choose another folder, or take it out")


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; its error is no `Exception`, and its class cannot be had by name."""
    return type(error).__name__ == "PanicException"


def _no_byte_tokens(name: str) -> UserError:
    return UserError(
        f"tokenizer {name!r} has no token for each single byte, so BitBPE cannot be made of it: "
        "take a byte-level BPE, or one with byte fallback"
    )


def byte_level_names() -> list[str]:
    """The character that stands for each byte in GPT-2's kind of BPE: itself where it prints, else the next one free."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = itertools.count(256)
    return [chr(byte if byte in prints else next(free)) for byte in range(256)]
