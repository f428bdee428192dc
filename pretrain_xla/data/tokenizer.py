"""Text ↔ token ids: tiktoken's encodings, any Hugging Face `tokenizer.json`, and plain bytes, behind one small
protocol.

In text, a special string such as `<|endoftext|>` is ordinary characters, always: whoever writes a document cannot
forge the border of one. The end-of-text id is put between documents as an id, never through text.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import tiktoken
import tokenizers

from pretrain_xla.data.documents import well_formed
from pretrain_xla.data.files import filesystem, write_atomically
from pretrain_xla.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>")
TOKENIZER_FILE, SPECIALS_FILE = "tokenizer.json", "special_tokens_map.json"


class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What `load_tokenizer` finds it by."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""

    @property
    def end_of_text(self) -> int:
        """Id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special strings in it are ordinary text, and nothing is added at either end."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8, and ids that do not exist, become U+FFFD."""


def known_tokenizers() -> list[str]:
    """Names that need no file."""
    return [*tiktoken.list_encoding_names(), "bytes"]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name.

    Args:
        name: one of tiktoken's encodings (`gpt2`, `cl100k_base`, ...), `bytes`, or the path or URL of a
            `tokenizer.json` or of a folder that holds one (`./gpt2` for a folder with an encoding's name).

    Raises:
        UserError: unknown name, no end-of-text token, a damaged file, or an encoding that cannot be downloaded.
    """
    if name == "bytes":
        return BytesTokenizer()
    known = known_tokenizers()
    if name in known:
        return TiktokenTokenizer(_encoding(name))
    fs, root = filesystem(name)
    for path in (root, f"{root}/{TOKENIZER_FILE}"):
        if fs.isfile(path):
            return _load_json(name, fs, path)
    if fs.isdir(root):
        raise UserError(f"tokenizer {name!r}: the folder has no {TOKENIZER_FILE}")
    if "/" in name:
        raise UserError(f"tokenizer {name!r}: no such file or folder (a {TOKENIZER_FILE}, or a folder that holds one)")
    near = difflib.get_close_matches(name, known, n=2)
    known_are = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise UserError(f"tokenizer {name!r}: neither a known name nor the path of a {TOKENIZER_FILE}; {known_are}")


@dataclass(frozen=True)
class BytesTokenizer:
    """UTF-8 bytes as ids 0–255, and end-of-text as 256: no vocabulary to learn, about four times as many tokens."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int = 256

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

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; tiktoken's threads run outside Python's lock."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

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
    """A Hugging Face `tokenizer.json`."""

    name: str
    tokenizer: tokenizers.Tokenizer
    end_of_text: int

    @cached_property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`; ids need not be without gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        clean = [well_formed(text) for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; what a run of ids that do not exist becomes is the library's choice (nothing)."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        return self.tokenizer.decode(known, skip_special_tokens=False)

    def save(self, folder: str) -> None:
        """Write `tokenizer.json`, and beside it which token ends a text, in the form that `transformers` reads too.

        Raises:
            UserError: the folder cannot be written.
        """
        fs, root = filesystem(folder)
        specials = {"eos_token": self.tokenizer.id_to_token(self.end_of_text)}
        write_atomically(fs, f"{root}/{TOKENIZER_FILE}", [self.tokenizer.to_str(pretty=True).encode()])
        write_atomically(fs, f"{root}/{SPECIALS_FILE}", [json.dumps(specials, indent=2).encode()])


def _encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # every error of `requests` is an OSError
        raise UserError(
            f"tokenizer {name!r}: its vocabulary cannot be downloaded ({type(error).__name__}); with no network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's cached file, or use `bytes` or a tokenizer.json"
        ) from None


def _load_json(name: str, fs: Any, path: str) -> JsonTokenizer:
    folder = path.rpartition("/")[0]
    try:
        tree = json.loads(fs.cat_file(path))
        names = _end_of_text_names(fs, folder)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"tokenizer {name!r}: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    found = [(text, token) for text in names if (token := tokenizer.token_to_id(text)) is not None]
    if not found:
        raise UserError(
            f"tokenizer {name!r}: no end-of-text token (looked for {', '.join(names)}); "
            f'name it in a {SPECIALS_FILE} beside it: {{"eos_token": "..."}}'
        )
    # Declared special, and specials matched as ordinary text: without both, text could forge the border of a document.
    text, end_of_text = found[0]
    tokenizer.add_special_tokens([text])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return JsonTokenizer(name, tokenizer, end_of_text)


def _end_of_text_names(fs: Any, folder: str) -> list[str]:
    """Names to look for: first the one that the files beside the tokenizer state, if any does."""
    for file in (SPECIALS_FILE, "tokenizer_config.json"):
        if fs.isfile(f"{folder}/{file}"):
            stated = json.loads(fs.cat_file(f"{folder}/{file}")).get("eos_token")
            stated = stated.get("content") if isinstance(stated, dict) else stated
            if stated:
                return [stated, *END_OF_TEXT_NAMES]
    return list(END_OF_TEXT_NAMES)
