"""Documents → one array of token ids with end-of-text after each; `prepare` spends most of its time here.

Where a tokenizer pre-tokenizes as GPT-2 does (tiktoken's `gpt2` and its relatives, and byte-level `tokenizer.json` files), its
regular expression is replaced by array operations and its BPE by a cache of pre-tokens; see `tokenizers/pre_tokenizer.py` and
`tokenizers/token_cache.py`. The ids are the same. Any other tokenizer encodes one document at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken

from pretrain_xla.text.documents import utf8
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.pre_tokenizer import BORDER_BYTE, LETTER, NUMBER, OTHER, SPACE, PreTokenizer
from pretrain_xla.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from pretrain_xla.tokenizers.token_cache import TokenCache
from pretrain_xla.tokenizers.tokenizer import Tokenizer

GPT2_LIKE = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")  # tiktoken's encodings that pre-tokenize as GPT-2 does
_BLOCK = 2**17  # bytes at a time, so that the arrays stay in a core's cache
_BORDER = bytes([BORDER_BYTE])

DocumentEncoder = Callable[[Sequence[str]], np.ndarray]
"""Texts → [tokens] uint32: the ids of every text, each text followed by end-of-text."""


def document_encoder(tokenizer: Tokenizer) -> DocumentEncoder:
    """The fastest way to encode many documents on one core; gives exactly the ids of `tokenizer.encode`.

    Not thread-safe. Takes some tens of MB.
    """
    if isinstance(tokenizer, BitBPETokenizer):
        base = document_encoder(tokenizer.base)
        return lambda texts: tokenizer.pack(base(texts))
    if isinstance(tokenizer, BytesTokenizer):
        return _encode_bytes
    if isinstance(tokenizer, TiktokenTokenizer):
        if tokenizer.name in GPT2_LIKE:
            return _by_pre_tokens(_tiktoken_cache(tokenizer.encoding))
        return lambda texts: _one_by_one(map(tokenizer.encode_to_numpy, texts), tokenizer.end_of_text)
    if isinstance(tokenizer, JsonTokenizer) and _splits_like_gpt2(tokenizer):
        return _by_pre_tokens(_json_cache(tokenizer))
    return lambda texts: _one_by_one(map(tokenizer.encode, texts), tokenizer.end_of_text)


def _by_pre_tokens(cache: TokenCache) -> DocumentEncoder:
    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.uint32), *map(cache.encode, _blocks(texts))])

    return encode


def _blocks(texts: Sequence[str]) -> Iterator[bytes]:
    block: list[bytes] = []
    size = 0
    for text in texts:
        block.append(utf8(text))
        size += len(block[-1])
        if size >= _BLOCK:
            yield _BORDER.join([*block, b""])
            block, size = [], 0
    if block:
        yield _BORDER.join([*block, b""])


def _encode_bytes(texts: Sequence[str]) -> np.ndarray:
    ids = np.frombuffer(_BORDER.join([*map(utf8, texts), b""]), np.uint8).astype(np.uint32)
    ids[ids == BORDER_BYTE] = BytesTokenizer.end_of_text
    return ids


def _one_by_one(encoded: Iterator[Sequence[int]] | Iterator[np.ndarray], end_of_text: int) -> np.ndarray:
    end = np.array([end_of_text], np.uint32)
    arrays = (np.asarray(ids, np.uint32) for ids in encoded)
    return np.concatenate([np.empty(0, np.uint32), *itertools.chain.from_iterable((ids, end) for ids in arrays)])


def _tiktoken_cache(encoding: tiktoken.Encoding) -> TokenCache:
    """For an encoding of `GPT2_LIKE`; tiktoken's own regular expressions classify characters."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    classes = {
        kind: tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s"))
    }

    def classify(character: str) -> int:
        # A character that the pattern does not match gives no tokens.
        return next((kind for kind, finder in classes.items() if finder.encode_ordinary(character)), OTHER)

    known: dict[bytes, int] = {}
    for token in encoding.token_byte_values():
        known[token] = encoding.encode_single_token(token)
    end = encoding.decode([encoding.eot_token])

    def encode_pre_tokens(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # One call for all of them: none contains this special string, which has both letters and signs.
        ids = encoding.encode_to_numpy(end.join([*texts, ""]), allowed_special={end}, disallowed_special=())
        ends = np.flatnonzero(ids == encoding.eot_token)
        return ids[ids != encoding.eot_token], np.diff(ends, prepend=-1) - 1

    return TokenCache(PreTokenizer(classify), encode_pre_tokens, known, encoding.eot_token)


def _json_cache(tokenizer: JsonTokenizer) -> TokenCache:
    """For a file that `_splits_like_gpt2`. Starts empty, as a file may merge the bytes of a token differently."""
    splitter = tokenizer.tokenizer.pre_tokenizer

    def classify(character: str) -> int:
        for kind, example in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
            if len(splitter.pre_tokenize_str(example + character)) == 1:
                return kind
        return SPACE

    def encode_pre_tokens(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [tokenizer.encode(text) for text in texts]
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(itertools.chain.from_iterable(encoded), np.uint32), counts

    return TokenCache(PreTokenizer(classify), encode_pre_tokens, {}, tokenizer.end_of_text)


def _splits_like_gpt2(tokenizer: JsonTokenizer) -> bool:
    """Whether the file pre-tokenizes as GPT-2 does, with nothing that adds text or works across pre-tokens."""
    tree: dict[str, Any] = json.loads(tokenizer.tokenizer.to_str())
    pre_tokenizer, model = tree["pre_tokenizer"] or {}, tree["model"]
    return (
        tree["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer["add_prefix_space"]
        and pre_tokenizer["use_regex"]
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in tree["added_tokens"])
    )
