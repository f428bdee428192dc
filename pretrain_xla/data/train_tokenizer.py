"""Train a byte-level BPE, GPT-2's kind, on own documents: lossless on any text, and right-sized for a small model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pretrain_xla.data.documents import well_formed
from pretrain_xla.data.tokenizer import END_OF_TEXT, JsonTokenizer, load_tokenizer
from pretrain_xla.errors import UserError

SMALLEST_VOCABULARY = 257  # every byte, and end-of-text


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that has no room for every byte.

    Raises:
        UserError: vocab_size < 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and end-of-text need {SMALLEST_VOCABULARY}")


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, output_dir: str, *, min_frequency: int = 2
) -> JsonTokenizer:
    """Train, save as `tokenizer.json` in a folder, and load it from there.

    The same documents give the same file, byte for byte. Where the documents do not have enough pairs to merge, the
    vocabulary ends up smaller than was asked for.

    Args:
        documents: the text to learn from; read once, never all in memory.
        vocab_size: number of ids, with the 256 bytes and `<|endoftext|>` (id 0) among them.
        output_dir: folder to write to; a local path or an fsspec URL.
        min_frequency: a pair that occurs less often is never merged.

    Raises:
        UserError: vocab_size < 257, or a folder that cannot be written.
    """
    check_vocab_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(well_formed, documents), trainer)
    JsonTokenizer(output_dir, tokenizer, end_of_text=0).save(output_dir)
    return cast(JsonTokenizer, load_tokenizer(output_dir))
