"""Our tokenizers, opened by `AutoTokenizer`: the same ids, for text and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers

from pretrain_xla.interop import tokenizer_files
from pretrain_xla.interop.special_tokens import before_text
from pretrain_xla.interop.tokenizer_files import ODD, PROBE, write_tokenizer
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer
from pretrain_xla.tokenizers.fingerprint import fingerprint
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

CACHE = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "tiktoken_cache"
TEXTS = [
    PROBE,
    "",
    " ",
    "\n\n\n",
    "a\u0301 \ufeff\u2028 tab\tand\x00nul",
    "1234567890 12 345 6.7e-8",
    "def f(x):\n        return x ** 2  # don't\r\n",
    "ﬁ Ⅷ ½ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 हिन्दी ไทย العربية 🏳️‍🌈",
]


def assert_same(tokenizer: Tokenizer, folder: Path) -> None:
    assert write_tokenizer(tokenizer, str(folder), 64) == []
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == ids, "nothing is added"
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.model_max_length == 64
    assert load_tokenizer(str(folder)).end_of_text == tokenizer.end_of_text
    assert load_tokenizer(str(folder)).encode(PROBE) == tokenizer.encode(PROBE)


def test_bytes(tmp_path: Path) -> None:
    assert_same(BytesTokenizer(), tmp_path)


def test_a_trained_one(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat and the dog sat on the log\n" * 50]
    assert_same(train_tokenizer(texts, 300, str(tmp_path / "own")), tmp_path / "out")


@pytest.mark.skipif(not CACHE.is_dir(), reason="needs ../shared/data/tokenizers/tiktoken_cache")
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_tiktoken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    assert_same(load_tokenizer(name), tmp_path)


def test_a_trained_sentencepiece_model(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat and the dog sat on the log\n" * 50]
    own = train_tokenizer(texts, 300, str(tmp_path / "own"), kind="sentencepiece", special_tokens=["<|user|>"])
    assert_same(own, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "own" / "tokenizer.model").read_bytes()
    assert fingerprint(load_tokenizer(str(tmp_path / "out"))) == fingerprint(own)


@pytest.mark.skipif(not CACHE.is_dir(), reason="needs ../shared/data/tokenizers")
@pytest.mark.parametrize("name", ["sentencepiece_32000.model", "sentencepiece_4096.model"])
def test_sentencepiece_models_of_others(name: str, tmp_path: Path) -> None:
    """T5's kind (Unigram, no bytes, text in NFKC) and Llama's (BPE, bytes), on text of Wikipedia."""
    own = load_tokenizer(str(CACHE.parent / name))
    assert write_tokenizer(own, str(tmp_path), 64) == []
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token_id, len(theirs)) == (own.end_of_text, own.vocab_size)
    lines = (CACHE.parents[1] / "text" / "en" / "wiki.test.raw").read_text().split("\n")[:300]
    for text in (*TEXTS, *ODD, *lines):
        if "<unk>" not in text and "</s>" not in text:  # which transformers takes for the tokens
            assert theirs(text)["input_ids"] == own.encode(text), text
    assert load_tokenizer(str(tmp_path)).encode_batch(lines) == own.encode_batch(lines)
    assert isinstance(own, SentencePieceTokenizer)
    write_tokenizer(own, str(tmp_path / "begins"), 64, adds_bos=True)
    begins = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "begins"))
    assert begins("a")["input_ids"] == [*before_text(own), *own.encode("a")]


def test_an_unequal_tokenizer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "_byte_characters", lambda: {byte: chr(0x400 + byte) for byte in range(256)})
    notes = write_tokenizer(BytesTokenizer(), str(tmp_path), 64)
    assert notes == ["tokenizer 'bytes' has no equal tokenizer.json, so none is written; pass its ids by yourself"]
    assert os.listdir(tmp_path) == []
