"""Hugging Face's `tokenizer.json`, loaded so that text cannot give special tokens and encoding is deterministic."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, write_atomically
from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers.special_tokens import NOT_IN_TEXT, text_encoder
from pretrain_xla.tokenizers.tokenizer import SPECIALS_FILE, TOKENIZER_FILE, no_byte_tokens, refuse_other_tokenizer

_STOCHASTIC_OPTIONS = ("dropout", "nbest_size", "alpha")


@dataclass(frozen=True)
class JsonTokenizer:
    """A Hugging Face `tokenizer.json`.

    `encoder`, where there is one, encodes in place of `tokenizer`, with which text could forge special tokens.
    """

    name: str
    tokenizer: tokenizers.Tokenizer
    end_of_text: int
    encoder: tokenizers.Tokenizer | None = None

    @staticmethod
    def of(name: str, content: str, end_of_text: str) -> JsonTokenizer:
        """The tokenizer in a file's content; options of the file that `Tokenizer` rules out are turned off.

        Args:
            name: the name that `load_tokenizer` loads it by.
            content: JSON.
            end_of_text: the token that ends a document; it must be in the vocabulary.

        Raises:
            UserError: see `text_encoder`.
        """
        tokenizer = tokenizers.Tokenizer.from_str(content)
        # Declared special, and special tokens matched as ordinary text: without both, text could forge the end of a document.
        tokenizer.add_special_tokens([end_of_text])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _make_deterministic(tokenizer)
        token = tokenizer.token_to_id(end_of_text)
        assert token is not None
        return JsonTokenizer(name, tokenizer, token, text_encoder(name, tokenizer, end_of_text))

    def __reduce__(self) -> tuple[Any, ...]:
        # `tokenizers` forgets `encode_special_tokens` when it is pickled.
        return JsonTokenizer.of, (self.name, self.tokenizer.to_str(), self.tokenizer.id_to_token(self.end_of_text))

    @cached_property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`; there may be gaps between ids."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """See `Tokenizer.byte_ids`: `<0xE3>` with byte fallback, or the characters that a byte-level BPE writes bytes as."""
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        for names in (fallback, byte_level_names()):
            ids = [token for name in names if (token := self.tokenizer.token_to_id(name)) is not None]
            if len(ids) == len(names):
                return tuple(ids)
        raise no_byte_tokens(self.name)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        with self._explain_panic():
            return (self.encoder or self.tokenizer).encode(self._clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        clean, encoder = [self._clean(text) for text in texts], self.encoder or self.tokenizer
        with self._explain_panic():
            return [encoding.ids for encoding in encoder.encode_batch_fast(clean, add_special_tokens=False)]

    def _clean(self, text: str) -> str:
        text = well_formed(text)
        return text.replace(NOT_IN_TEXT, "\ufffd") if self.encoder is not None else text

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; the library decides what ids that do not exist become (nothing)."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        with self._explain_panic():
            return self.tokenizer.decode(known, skip_special_tokens=False)

    @contextlib.contextmanager
    def _explain_panic(self) -> Iterator[None]:
        """The library panics (in Rust) when a regular expression exceeds its limits."""
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"tokenizer {self.name!r}: cannot go on ({' '.join(str(error).split())[:120]}): one of its regular expressions "
                "cannot match this text; remove the text, or use another tokenizer"
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
        """Write `tokenizer.json`, and next to it the end-of-text token, in the form that `transformers` reads too.

        Raises:
            UserError: the folder cannot be written.
        """
        fs, root = filesystem(folder)
        refuse_other_tokenizer(fs, root, TOKENIZER_FILE)
        specials = {"eos_token": self.tokenizer.id_to_token(self.end_of_text)}
        write_atomically(fs, f"{root}/{TOKENIZER_FILE}", [self.tokenizer.to_str(pretty=True).encode()])
        write_atomically(fs, f"{root}/{SPECIALS_FILE}", [json.dumps(specials, indent=2).encode()])


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a Rust library. It is no `Exception`, and its class cannot be imported."""
    return type(error).__name__ == "PanicException"


def byte_level_names() -> list[str]:
    """The character that GPT-2's BPE writes each byte as: the byte's own where it is printable, else the next unused one."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unused = itertools.count(256)
    return [chr(byte if byte in printable else next(unused)) for byte in range(256)]


def is_stochastic(tree: Any) -> bool:
    """Whether the content of a `tokenizer.json` asks for stochastic encoding: BPE-dropout, or sampling by a Unigram model.

    The same text would then give other tokens each time, and a prepared dataset could not be made again.
    """
    model = tree.get("model") if isinstance(tree, dict) else None
    return isinstance(model, dict) and bool(model.get("dropout") or (model.get("nbest_size") or 0) not in (0, 1))


def _make_deterministic(tokenizer: tokenizers.Tokenizer) -> None:
    for option in _STOCHASTIC_OPTIONS:
        if getattr(tokenizer.model, option, None) is not None:
            setattr(tokenizer.model, option, None)
