"""What the package asks of a tokenizer, whichever library is behind it, and which files make a folder a tokenizer.

In text, a special string such as `<|endoftext|>` is always ordinary characters, so that a document cannot forge its own end.
The end-of-text id is put between documents as an id, never through text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeGuard

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import url

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE, SPECIALS_FILE = "tokenizer.json", "special_tokens_map.json"
SENTENCEPIECE_FILE, BITBPE_FILE = "tokenizer.model", "bitbpe.json"
TOKENIZER_FILES = (BITBPE_FILE, TOKENIZER_FILE, SENTENCEPIECE_FILE)
"""A folder that holds one of these is a tokenizer; the first one found decides."""


class Tokenizer(Protocol):
    """Text ↔ token ids."""

    @property
    def name(self) -> str:
        """The name that `load_tokenizer` loads it by."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""

    @property
    def end_of_text(self) -> int:
        """Id that ends a document."""

    @property
    def byte_ids(self) -> tuple[int, ...]:
        """Id of each of the 256 single bytes; raises `UserError` where it has no such tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special strings in it are ordinary text, and nothing is added at either end."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8, and ids that do not exist, become U+FFFD."""


class StoredTokenizer(Tokenizer, Protocol):
    """A tokenizer that is a file, so that datasets and runs keep a copy of it."""

    @property
    def file_name(self) -> str:
        """Name of its file, in any folder: one of `TOKENIZER_FILES`."""

    @property
    def content(self) -> bytes:
        """Everything that its ids depend on; for a checksum."""

    def save(self, folder: str) -> None:
        """Write it to a folder, from which `load_tokenizer` loads the same; raises `UserError` where it cannot."""


def is_stored(tokenizer: Tokenizer) -> TypeGuard[StoredTokenizer]:
    """Whether a tokenizer is a file. Asks its class, because `isinstance` of a protocol would compute every property."""
    return hasattr(type(tokenizer), "save")


def decode_after(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> str:
    """The text that `ids` add to `text`. They are decoded together: a space or a BitBPE prefix may depend on what precedes.

    Args:
        tokenizer: encodes and decodes.
        text: what came before.
        ids: its continuation.
    """
    before = tokenizer.encode(text)
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def refuse_other_tokenizer(fs: Any, root: str, *own: str) -> None:
    """Refuse to write to a folder that holds another kind of tokenizer, as it would be ambiguous.

    Args:
        fs: an fsspec file system.
        root: the folder on it.
        own: the files that will be written.

    Raises:
        UserError: naming the file.
    """
    for file in TOKENIZER_FILES:
        if file not in own and fs.exists(f"{root}/{file}"):
            raise UserError(f"{url(fs, root)}: holds another tokenizer ({file}): choose another folder, or remove it")


def no_byte_tokens(name: str) -> UserError:
    """The error of a tokenizer that BitBPE cannot be built on."""
    return UserError(
        f"tokenizer {name!r} has no token for each single byte, which BitBPE needs: use a byte-level BPE, or one with "
        "byte fallback"
    )
