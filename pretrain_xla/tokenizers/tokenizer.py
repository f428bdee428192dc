"""Text ↔ token ids: tiktoken's encodings, any Hugging Face `tokenizer.json`, GPT-2's pair of a vocabulary and merges,
SentencePiece models, plain bytes, and any of these with BitBPE, behind one small protocol.

In text, a special string such as `<|endoftext|>` is ordinary characters, always: whoever writes a document cannot
forge the border of one. The end-of-text id is put between documents as an id, never through text.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeGuard

import sentencepiece
import tiktoken
import tokenizers

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer
from pretrain_xla.storage.files import filesystem
from pretrain_xla.tokenizers.kinds import (
    BITBPE_FILE,
    END_OF_TEXT,
    SPECIALS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    is_panic,
)
from pretrain_xla.tokenizers.patterns import check_patterns
from pretrain_xla.tokenizers.plain_text import takes_chance
from pretrain_xla.tokenizers.vocab_merges import VOCABULARIES, as_tokenizer_json, is_vocabulary
from pretrain_xla.untrusted import parse_json, parse_object

__all__ = [
    "END_OF_TEXT",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "BytesTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "StoredTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "decode_after",
    "is_stored",
    "known_tokenizers",
    "load_tokenizer",
    "stored_tokenizer",
]

logger = logging.getLogger(__name__)

OTHER_FILES = ("spiece.model", *VOCABULARIES)  # that others write, and we only read
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>")


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
    """A tokenizer that is a file, and so is copied beside what was made with it."""

    @property
    def file_name(self) -> str:
        """Name of its file, in whatever folder: one of `TOKENIZER_FILES`."""

    @property
    def content(self) -> bytes:
        """All that its ids depend on; for a checksum."""

    def save(self, folder: str) -> None:
        """Write it to a folder, from which `load_tokenizer` loads the same; raises `UserError` where it cannot."""


def is_stored(tokenizer: Tokenizer) -> TypeGuard[StoredTokenizer]:
    """Whether a tokenizer is a file. Its class is asked: `isinstance` of a protocol would compute every property."""
    return hasattr(type(tokenizer), "save")


def decode_after(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> str:
    """What ids add to a text that they continue; it may need the text to be read (a space, a BitBPE prefix).

    Args:
        tokenizer: what the text was encoded and is decoded with.
        text: what came before.
        ids: its continuation.
    """
    before = tokenizer.encode(text)
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def known_tokenizers() -> list[str]:
    """Names that need no file."""
    return [*tiktoken.list_encoding_names(), "bytes"]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name.

    Args:
        name: one of tiktoken's encodings (`gpt2`, `cl100k_base`, ...), `bytes`, or the path or URL of a
            `tokenizer.json`, a SentencePiece `.model`, a `bitbpe.json` or a `vocab.json` with `merges.txt` beside it, or of
            a folder that holds one (`./gpt2` for a folder with an encoding's name).

    Raises:
        UserError: unknown name, no end-of-text token, a damaged file, or an encoding that cannot be downloaded.
    """
    if name == "bytes":
        return BytesTokenizer()
    known = known_tokenizers()
    if name in known:
        return TiktokenTokenizer(_encoding(name))
    fs, root = filesystem(name)
    for path in (root, *(f"{root}/{file}" for file in (*TOKENIZER_FILES, *OTHER_FILES))):
        if fs.isfile(path):
            return _load_file(name, fs, path)
    wanted = " or ".join(TOKENIZER_FILES)
    if fs.isdir(root):
        raise UserError(f"tokenizer {name!r}: the folder has no {wanted}")
    if "/" in name:
        fetch = f"; of the Hub? Fetch it first: hf download {name} --include '*token*' '*.model' --local-dir tokenizers/{name}"
        from_hub = fetch if name.count("/") == 1 and "://" not in name and not name.startswith((".", "/", "~")) else ""
        raise UserError(
            f"tokenizer {name!r}: no such file or folder (a {wanted}, or a folder that holds one){from_hub}"
        )
    near = difflib.get_close_matches(name, known, n=2)
    known_are = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise UserError(f"tokenizer {name!r}: neither a known name nor the path of a {TOKENIZER_FILE}; {known_are}")


def stored_tokenizer(folder: str) -> str | None:
    """Path or URL of the tokenizer's file in a folder; none where there is none.

    Raises:
        UserError: a protocol that is unknown, or whose package is not installed.
    """
    fs, root = filesystem(folder)
    return next((f"{folder.rstrip('/')}/{file}" for file in TOKENIZER_FILES if fs.isfile(f"{root}/{file}")), None)


def _encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # every error of `requests` is an OSError
        raise UserError(
            f"tokenizer {name!r}: its vocabulary cannot be downloaded ({type(error).__name__}); with no network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's cached file, or use `bytes` or a tokenizer.json"
        ) from None


def _load_file(name: str, fs: Any, path: str) -> Tokenizer:
    if path.endswith(BITBPE_FILE):
        from pretrain_xla.tokenizers.bitbpe import load_bitbpe  # it is built on this module

        return load_bitbpe(name, fs, path)
    if path.endswith(".model"):
        return _load_sentencepiece(name, fs, path)
    return _load_json(name, fs, path)


def _load_sentencepiece(name: str, fs: Any, path: str) -> SentencePieceTokenizer:
    try:
        content = fs.cat_file(path)
        refuse_pointer(content, path)
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer {name!r}: {path} is no SentencePiece model ({type(error).__name__})") from None
    named = (model.piece_to_id(text) for text in END_OF_TEXT_NAMES)
    found = [token for token in (model.eos_id(), *named) if token >= 0 and model.is_control(token)]
    if not found:
        raise UserError(
            f"tokenizer {name!r}: no end-of-text token (no end of sentence, and no control symbol "
            f"{', '.join(END_OF_TEXT_NAMES)}): train it with one"
        )
    return SentencePieceTokenizer(name, model, found[0])


def _load_json(name: str, fs: Any, path: str) -> JsonTokenizer:
    folder = path.rpartition("/")[0]
    try:
        content = as_tokenizer_json(name, fs, path) if is_vocabulary(path) else fs.cat_file(path).decode("utf-8-sig")
        names = _end_of_text_names(fs, folder)
        tree = parse_json(content, path)
        check_patterns(name, tree)
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except UserError:
        raise
    except BaseException as error:  # `tokenizers` raises plain Exception, and worse
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UserError(f"tokenizer {name!r}: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    found = [text for text in names if tokenizer.token_to_id(text) is not None]
    if not found:
        raise UserError(
            f"tokenizer {name!r}: no end-of-text token (looked for {', '.join(names)}); "
            f'name it in a {SPECIALS_FILE} beside it: {{"eos_token": "..."}}'
        )
    made = JsonTokenizer.of(name, content, found[0])
    if takes_chance(tree):
        _say_no_chance(name)
    return made


@functools.cache
def _say_no_chance(name: str) -> None:
    """Once for each tokenizer."""
    logger.warning(
        "tokenizer %s: it encodes by chance (dropout); that is turned off, so that a text is the same tokens each time",
        name,
    )


def _end_of_text_names(fs: Any, folder: str) -> list[str]:
    """Names to look for: first the one that the files beside the tokenizer state, if any does."""
    for file in (SPECIALS_FILE, "tokenizer_config.json"):
        if fs.isfile(f"{folder}/{file}"):
            stated = parse_object(fs.cat_file(f"{folder}/{file}"), f"{folder}/{file}").get("eos_token")
            stated = stated.get("content") if isinstance(stated, dict) else stated
            if stated and isinstance(stated, str):
                return [stated, *END_OF_TEXT_NAMES]
    return list(END_OF_TEXT_NAMES)
