"""Loads a tokenizer by name, path or URL."""

from __future__ import annotations

import difflib
import functools
import logging
from typing import Any

import sentencepiece
import tiktoken
import tokenizers

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer
from pretrain_xla.storage.files import filesystem
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer
from pretrain_xla.tokenizers.checksums import check_checksums
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer, is_panic, is_stochastic
from pretrain_xla.tokenizers.regex_check import check_patterns
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from pretrain_xla.tokenizers.tokenizer import (
    BITBPE_FILE,
    END_OF_TEXT,
    SPECIALS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    Tokenizer,
)
from pretrain_xla.tokenizers.vocab_merges import VOCABULARIES, as_tokenizer_json, is_vocabulary
from pretrain_xla.untrusted import is_inside, parse_json, parse_object

logger = logging.getLogger(__name__)

OTHER_FILES = ("spiece.model", *VOCABULARIES)  # read, but never written here
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>")


def known_tokenizers() -> list[str]:
    """Names of the tokenizers that are built in or downloaded by tiktoken, so need no file."""
    return [*tiktoken.list_encoding_names(), "bytes"]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name.

    Args:
        name: one of tiktoken's encodings (`gpt2`, `cl100k_base`, ...), `bytes`, or the path or URL of a
            `tokenizer.json`, a SentencePiece `.model`, a `bitbpe.json` or a `vocab.json` with `merges.txt` next to it, or of
            a folder that holds one (write `./gpt2` for a folder that has the name of an encoding).

    Raises:
        UserError: unknown name, no end-of-text token, a damaged file, one that differs from the checksum that a dataset or a
            run recorded, or an encoding that cannot be downloaded.
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
        fetch = f"; on the Hub? Fetch it first: hf download {name} --include '*token*' '*.model' --local-dir tokenizers/{name}"
        from_hub = fetch if name.count("/") == 1 and "://" not in name and not name.startswith((".", "/", "~")) else ""
        raise UserError(
            f"tokenizer {name!r}: no such file or folder (a {wanted}, or a folder that holds one){from_hub}"
        )
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join(known)}"
    raise UserError(f"tokenizer {name!r}: neither a known name nor the path of a {TOKENIZER_FILE}; {hint}")


def stored_tokenizer(folder: str) -> str | None:
    """Path or URL of the tokenizer's file in a folder; None where there is none.

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
            f"tokenizer {name!r}: its vocabulary cannot be downloaded ({type(error).__name__}); without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's cached file, or use `bytes` or a tokenizer.json"
        ) from None


def _load_file(name: str, fs: Any, path: str) -> Tokenizer:
    check_checksums(name, fs, path.rpartition("/")[0])
    if path.endswith(BITBPE_FILE):
        return _load_bitbpe(name, fs, path)
    if path.endswith(".model"):
        return _load_sentencepiece(name, fs, path)
    return _load_json(name, fs, path)


def _load_bitbpe(name: str, fs: Any, path: str) -> BitBPETokenizer:
    tree = parse_object(fs.cat_file(path), path)
    try:
        base, num_prefix_tokens = str(tree["base"]), int(tree["num_prefix_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer {name!r}: {path} is damaged ({error!r}): convert it again") from None
    is_file = base not in known_tokenizers()  # in the same folder
    if is_file and ("/" in base or not is_inside(base)):
        raise UserError(
            f"tokenizer {name!r}: {path} names {base!r}, which is not a file in its folder: do not trust it"
        )
    folder = name.removesuffix(BITBPE_FILE).rstrip("/") or "."
    return BitBPETokenizer(name, load_tokenizer(f"{folder}/{base}" if is_file else base), num_prefix_tokens)


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
            f'name it in a {SPECIALS_FILE} next to it: {{"eos_token": "..."}}'
        )
    loaded = JsonTokenizer.of(name, content, found[0])
    if is_stochastic(tree):
        _warn_deterministic(name)
    return loaded


@functools.cache
def _warn_deterministic(name: str) -> None:
    """Once for each tokenizer."""
    logger.warning(
        "tokenizer %s: its stochastic encoding (dropout) is turned off, so that a text gives the same tokens each time",
        name,
    )


def _end_of_text_names(fs: Any, folder: str) -> list[str]:
    """Names to look for: first the one stated by the files next to the tokenizer, if any."""
    for file in (SPECIALS_FILE, "tokenizer_config.json"):
        if fs.isfile(f"{folder}/{file}"):
            stated = parse_object(fs.cat_file(f"{folder}/{file}"), f"{folder}/{file}").get("eos_token")
            stated = stated.get("content") if isinstance(stated, dict) else stated
            if stated and isinstance(stated, str):
                return [stated, *END_OF_TEXT_NAMES]
    return list(END_OF_TEXT_NAMES)
