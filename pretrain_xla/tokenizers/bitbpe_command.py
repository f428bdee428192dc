"""Command-line interface of `convert_bpe_to_bitbpe.py`: makes a BitBPE tokenizer from another one, and tests it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain_xla.command_line import parse
from pretrain_xla.errors import UserError
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer

EXAMPLES = {
    "English": "The quick brown fox jumps over the lazy dog.",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。",
    "Chinese, simplified": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
    "Chinese, traditional": "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "mixed": "Hello 世界! こんにちは 안녕하세요 🌏 naïve ελληνικά",
}
_RANDOM_STRINGS, _LONGEST = 200, 400


@dataclass(frozen=True)
class ConvertFlags:
    """Pack the byte tokens of a tokenizer: BitBPE, shorter Chinese, Japanese and Korean. See docs/tokenizers.md."""

    input_path: str
    """tokenizer.json, SentencePiece .model, a folder with one of these, a tiktoken name, or `bytes`."""
    output_path: str
    """Folder to write to; every --tokenizer flag accepts it."""
    num_prefix_tokens: int = 64
    """Ids reserved for prefixes: 4, 8, 16, 32 or 64. Only four occur; 64 has one for each value of six bits."""
    test_conversion: bool = False
    """Test it on text in several languages and on random bytes, and show the lengths."""


def convert_command(arguments: Sequence[str]) -> None:
    """Parse the flags, convert, and, if asked, test what was written.

    Raises:
        UserError: no such tokenizer, one without byte tokens, or a folder that cannot be written.
    """
    flags = parse(ConvertFlags, arguments, program="convert_bpe_to_bitbpe.py", command="convert")
    converted = BitBPETokenizer("", load_tokenizer(flags.input_path), flags.num_prefix_tokens)
    converted.save(flags.output_path)
    loaded = load_tokenizer(flags.output_path)
    assert isinstance(loaded, BitBPETokenizer)
    print(
        f"{flags.output_path}: {loaded.base.vocab_size:,} ids and {loaded.vocab_size - loaded.base.vocab_size} of BitBPE"
    )
    if flags.test_conversion:
        check_conversion(loaded)


def check_conversion(tokenizer: BitBPETokenizer) -> None:
    """Compare a BitBPE tokenizer with its base on text and on random bytes, and print the lengths in tokens.

    Raises:
        UserError: something is not decoded to what was encoded.
    """
    base, table = tokenizer.base, Table()
    for heading in ("text", "base", "BitBPE", "change"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, text in EXAMPLES.items():
        plain, packed = base.encode(text), tokenizer.encode(text)
        if tokenizer.decode(packed) != base.decode(plain):
            raise UserError(f"tokenizer {tokenizer.name!r}: {name} text does not survive: report this as a bug")
        table.add_row(name, str(len(plain)), str(len(packed)), f"{len(packed) / len(plain) - 1:+.0%}")
    Console().print(table)
    rng = np.random.default_rng(0)
    for length in rng.integers(0, _LONGEST, _RANDOM_STRINGS):
        # Half of them consist of bytes that can be packed, as random bytes seldom can.
        raw = (
            rng.integers(0, 256, length) if length % 2 else rng.choice([*range(0x80, 0xC0), *range(0xE0, 0xF0)], length)
        )
        ids = np.array(tokenizer.byte_ids, np.uint32)[raw]
        if not np.array_equal(tokenizer.unpack(tokenizer.pack(ids)), ids):
            raise UserError(
                f"tokenizer {tokenizer.name!r}: bytes {bytes(raw.tolist())!r} do not survive: report this as a bug"
            )
    print(f"every text and {_RANDOM_STRINGS} random byte strings came back unchanged")
