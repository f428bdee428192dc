"""Trains a tokenizer on your own documents: byte-level BPE, as GPT-2's, or SentencePiece BPE with byte fallback.

A small model needs a smaller vocabulary than GPT-2's. Both kinds are lossless on any text.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, make_folder
from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.tokenizer import (
    END_OF_TEXT,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    refuse_other_tokenizer,
)

Kind = Literal["bpe", "sentencepiece"]
_LONGEST_LINE = 10_000  # characters: SentencePiece skips sentences over a limit, so longer lines are split


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str] = (), kind: Kind = "bpe") -> None:
    """Refuse a vocabulary that is too small for every byte.

    Raises:
        UserError: fewer ids than the 256 bytes and the special tokens need.
    """
    needed = 257 + len(set(special_tokens) - {END_OF_TEXT}) + (kind == "sentencepiece")
    if vocab_size < needed:
        raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and the special tokens need {needed}")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    output_dir: str,
    *,
    kind: Kind = "bpe",
    special_tokens: Sequence[str] = (),
    min_frequency: int = 2,
    max_lines: int | None = None,
) -> Tokenizer:
    """Train a tokenizer, save it in a folder, and load it from there.

    The same documents give the same file, byte for byte. A byte-level BPE is smaller than `vocab_size` where the documents do
    not have enough pairs to merge.

    Args:
        documents: the text to learn from; read once. `bpe` streams it; SentencePiece holds all of it in memory.
        vocab_size: number of ids, including the bytes and the special tokens.
        output_dir: folder to write to; a local path or an fsspec URL.
        kind: `bpe` writes `tokenizer.json`, `sentencepiece` a `tokenizer.model`: BPE without normalisation, where
            characters that are too rare for a token fall back to bytes.
        special_tokens: in addition to `<|endoftext|>`. Text never gives one: the same characters in text are ordinary text.
        min_frequency: for `bpe`: a pair that occurs less often is never merged.
        max_lines: learn from at most this many lines of text.

    Raises:
        UserError: a vocabulary that is too small or too large for the text, special tokens that text could give, or a
            folder that cannot be written or holds another kind of tokenizer.
    """
    check_vocab_size(vocab_size, special_tokens, kind)
    if max_lines is not None and max_lines < 1:
        raise UserError(f"max_lines={max_lines}: ask for at least 1")
    if min_frequency < 1:
        raise UserError(f"min_frequency={min_frequency}: ask for at least 1")
    _check_special_tokens(special_tokens, kind)
    fs, root = filesystem(output_dir)
    refuse_other_tokenizer(fs, root, TOKENIZER_FILE if kind == "bpe" else SENTENCEPIECE_FILE)
    make_folder(fs, root)
    specials = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
    texts = _first_lines(map(well_formed, documents), max_lines)
    if kind == "bpe":
        _train_bpe(texts, vocab_size, specials, min_frequency).save(output_dir)
    else:
        _train_sentencepiece(texts, vocab_size, specials).save(output_dir)
    return load_tokenizer(output_dir)


def _check_special_tokens(special_tokens: Sequence[str], kind: Kind) -> None:
    """Refuse what text could give too: in byte-level BPE, any text that is one pre-token, as merges may produce it."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {*splitter.alphabet()}
    for token in special_tokens:
        text = decoders.ByteLevel().decode([token])
        if not token or (kind == "bpe" and alphabet.issuperset(token) and len(splitter.pre_tokenize_str(text)) == 1):
            raise UserError(f"special token {token!r}: text could give it as well: use one such as <|name|>")


def _first_lines(documents: Iterable[str], max_lines: int | None) -> Iterator[str]:
    if max_lines is None:
        yield from documents
        return
    for document in documents:
        lines = document.splitlines(keepends=True)
        yield "".join(lines[:max_lines])
        max_lines -= len(lines)
        if max_lines <= 0:
            return


def _train_bpe(texts: Iterable[str], vocab_size: int, specials: list[str], min_frequency: int) -> JsonTokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer("", tokenizer, end_of_text=0)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, specials: list[str]) -> SentencePieceTokenizer:
    written = io.BytesIO()
    lines = (
        line[begin : begin + _LONGEST_LINE]
        for text in texts
        for line in text.splitlines()
        for begin in range(0, len(line), _LONGEST_LINE)
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            # Lossless: nothing is normalised, no space is added or removed.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            control_symbols=specials[1:],
            max_sentence_length=4 * _LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        text = " ".join(str(error).split()).rpartition("] ")[2][:200]
        raise UserError(f"vocab_size={vocab_size}: SentencePiece cannot train: {text}") from None
    return SentencePieceTokenizer(
        "", sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()), end_of_text=1
    )
