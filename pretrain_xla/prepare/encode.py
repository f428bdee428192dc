"""Documents → one array of token ids with end-of-text after each: what `prepare` spends its time on.

Where a tokenizer cuts text by GPT-2's rule (tiktoken's `gpt2` and its kin, and byte-level `tokenizer.json` files), its own
regular expression is replaced by array arithmetic and its look-ups by a table; see `pieces.py` and `piece_table.py`. The
ids are the same, at about three times the speed. Any other tokenizer is asked for one document at a time.
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
from pretrain_xla.tokenizers.pre_tokenizer import BORDER_BYTE, LETTER, NUMBER, OTHER, SPACE, PieceCutter
from pretrain_xla.tokenizers.token_cache import PieceTable
from pretrain_xla.tokenizers.tokenizer import BytesTokenizer, JsonTokenizer, TiktokenTokenizer, Tokenizer

GPT2_LIKE = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")  # tiktoken's encodings that cut as GPT-2 does
_BLOCK = 2**17  # bytes at a time: the arrays that come of it stay in a core's cache
_BORDER = bytes([BORDER_BYTE])

DocumentEncoder = Callable[[Sequence[str]], np.ndarray]
"""Texts → [tokens] uint32: the ids of every text, each text followed by end-of-text."""


def document_encoder(tokenizer: Tokenizer) -> DocumentEncoder:
    """The fastest way to encode many documents on one core; gives exactly the ids of `tokenizer.encode`.

    Not to be shared between threads. Takes some tens of MB.
    """
    if isinstance(tokenizer, BitBPETokenizer):
        base = document_encoder(tokenizer.base)
        return lambda texts: tokenizer.pack(base(texts))
    if isinstance(tokenizer, BytesTokenizer):
        return _encode_bytes
    if isinstance(tokenizer, TiktokenTokenizer):
        if tokenizer.name in GPT2_LIKE:
            return _by_pieces(_tiktoken_table(tokenizer.encoding))
        return lambda texts: _one_by_one(map(tokenizer.encode_to_numpy, texts), tokenizer.end_of_text)
    if isinstance(tokenizer, JsonTokenizer) and _cuts_like_gpt2(tokenizer):
        return _by_pieces(_json_table(tokenizer))
    return lambda texts: _one_by_one(map(tokenizer.encode, texts), tokenizer.end_of_text)


def _by_pieces(table: PieceTable) -> DocumentEncoder:
    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.uint32), *map(table.encode, _blocks(texts))])

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


def _tiktoken_table(encoding: tiktoken.Encoding) -> PieceTable:
    """For an encoding of `GPT2_LIKE`; classes of characters come from the regular expressions of tiktoken itself."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    classes = {
        kind: tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s"))
    }

    def classify(character: str) -> int:
        # What the pattern does not match gives no tokens.
        return next((kind for kind, finder in classes.items() if finder.encode_ordinary(character)), OTHER)

    known: dict[bytes, int] = {}
    for piece in encoding.token_byte_values():
        known[piece] = encoding.encode_single_token(piece)
    end = encoding.decode([encoding.eot_token])

    def encode_pieces(pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # One call for all: no piece has this special string in it, as it has both letters and signs.
        ids = encoding.encode_to_numpy(end.join([*pieces, ""]), allowed_special={end}, disallowed_special=())
        ends = np.flatnonzero(ids == encoding.eot_token)
        return ids[ids != encoding.eot_token], np.diff(ends, prepend=-1) - 1

    return PieceTable(PieceCutter(classify), encode_pieces, known, encoding.eot_token)


def _json_table(tokenizer: JsonTokenizer) -> PieceTable:
    """For a file that `_cuts_like_gpt2`; nothing is known beforehand, as a file may merge a token's bytes otherwise."""
    cut = tokenizer.tokenizer.pre_tokenizer

    def classify(character: str) -> int:
        for kind, example in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
            if len(cut.pre_tokenize_str(example + character)) == 1:
                return kind
        return SPACE

    def encode_pieces(pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [tokenizer.encode(piece) for piece in pieces]
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(itertools.chain.from_iterable(encoded), np.uint32), counts

    return PieceTable(PieceCutter(classify), encode_pieces, {}, tokenizer.end_of_text)


def _cuts_like_gpt2(tokenizer: JsonTokenizer) -> bool:
    """Whether the file says that pieces are cut by GPT-2's rule, and nothing that reaches across pieces or adds any."""
    tree: dict[str, Any] = json.loads(tokenizer.tokenizer.to_str())
    cut, model = tree["pre_tokenizer"] or {}, tree["model"]
    return (
        tree["normalizer"] is None
        and cut.get("type") == "ByteLevel"
        and not cut["add_prefix_space"]
        and cut["use_regex"]
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in tree["added_tokens"])
    )
