from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.errors import UserError
from pretrain_xla.prepare.encode import document_encoder
from pretrain_xla.text.documents import well_formed
from pretrain_xla.tokenizers import token_cache
from pretrain_xla.tokenizers.bitbpe import BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.pre_tokenizer import BORDER_BYTE
from pretrain_xla.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

CORPUS = [
    "they're the quick  brown fox's; we'll\n\n see 123 foxes, won't we? ",
    "naïve café 日本語 한국어 😀 'tis",
] * 20
# What the rule turns on: apostrophes, blanks and other white space, digits of several scripts, marks, letters of 1-4 bytes.
ALPHABET = "''''sdmtlvreSDLV    \n\n\t\r\x0b\x1c\x85\u00a0\u2003\u3000aéß日語1²٣Ⅷ.!-—\u0301\u200b\x00😀𝒜\ud800"
TEXTS = st.lists(st.text(alphabet=ALPHABET, max_size=60) | st.text(max_size=60), max_size=8)


def small_gpt2():
    """GPT-2's pattern over a vocabulary of our own, so that no file is needed."""
    words = [
        b"th",
        b"the",
        b" t",
        b" th",
        b" the",
        b"'s",
        b"'l",
        b"'ll",
        b"  ",
        b"\n\n",
        b"  \n",
        b"re",
        b"12",
        b"\xe6\x97",
    ]
    ranks = {piece: rank for rank, piece in enumerate([*(bytes([byte]) for byte in range(256)), *words])}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    special = {"<|endoftext|>": len(ranks)}
    return TiktokenTokenizer(tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


@pytest.fixture(scope="module", params=["gpt2", "json", "bytes", "sentencepiece", "bitbpe"])
def tokenizer(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "json":
        return train_tokenizer(CORPUS, 330, folder)
    if request.param == "sentencepiece":
        return train_tokenizer(CORPUS, 330, folder, kind="sentencepiece")
    return small_gpt2() if request.param == "gpt2" else BitBPETokenizer("", small_gpt2())


@pytest.fixture(scope="module")
def encode(tokenizer):
    return document_encoder(tokenizer)


@given(texts=TEXTS)
def test_same_ids_as_the_tokenizer_itself(tokenizer, encode, texts):
    wanted = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_text]]
    assert encode(texts).tolist() == wanted


def test_long_pre_tokens_long_texts_and_none(tokenizer, encode):
    texts = ["x" * 5000 + " " * 40 + "=" * 300, "", "日" * 50 + "\n" * 20, "the fox's " * 40_000]
    wanted = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_text]]
    assert encode(texts).tolist() == encode(texts).tolist() == wanted
    assert encode([]).tolist() == []


def test_survives_pickling(tokenizer):
    """As on the way to a worker: special strings stay ordinary text."""
    text = "a<|endoftext|>b they're 日本語"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.end_of_text not in again.encode(text)
    assert document_encoder(again)([text]).tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]


def test_full_cache_is_cleared_and_goes_on(monkeypatch):
    monkeypatch.setattr(token_cache, "_SLOT_BITS", 11)
    tokenizer = small_gpt2()
    encode = document_encoder(tokenizer)
    for begin in range(0, 20_000, 1000):
        text = " ".join(f"w{number:x}" for number in range(begin, begin + 1000))
        assert encode([text, text]).tolist() == [*tokenizer.encode(text), tokenizer.end_of_text] * 2


def test_border_is_no_byte_of_utf8():
    assert all(BORDER_BYTE not in chr(code).encode(errors="replace") for code in range(0x110000))


@pytest.mark.usefixtures("gpt2_cache")
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
@pytest.mark.parametrize("file", ["en/openstax", "en/manual", "ja/wikipedia", "ko/klue", "zh/wikipedia_hant"])
def test_real_text(shared, name, file):
    with gzip.open(shared(f"text/{file}.jsonl.gz"), "rt") as lines:
        texts = [json.loads(line)["text"][:20_000] for line, _ in zip(lines, range(30), strict=False)]
    tokenizer = load_tokenizer(name)
    wanted = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_text]]
    assert np.array_equal(document_encoder(tokenizer)(texts), wanted)


@pytest.mark.usefixtures("gpt2_cache")
def test_text_that_the_regular_expression_gives_up_on_is_named():
    tokenizer = load_tokenizer("cl100k_base")
    text = "An odd page" + " " * 1_000_000 + "x"
    for encode in (document_encoder(tokenizer), tokenizer.encode_batch, lambda texts: tokenizer.encode(texts[0])):
        with pytest.raises(
            UserError, match=r"document that begins 'An odd page .* \(1,000,012 characters\): Regex error"
        ):
            encode([text])


@pytest.mark.usefixtures("gpt2_cache")
def test_every_character_of_unicode_in_every_company():
    """GPT-2's own vocabulary; each character after a letter, a digit, a sign and a blank, and before a letter."""
    tokenizer = load_tokenizer("gpt2")
    encode = document_encoder(tokenizer)
    for begin in range(0, 0x110000, 0x4000):
        text = "".join(
            f"a{c}1{c}!{c} {c}b\n" for c in map(chr, range(begin, begin + 0x4000, 1 if begin < 0x20000 else 31))
        )
        assert encode([text]).tolist() == [*tokenizer.encode(well_formed(text)), tokenizer.end_of_text]
