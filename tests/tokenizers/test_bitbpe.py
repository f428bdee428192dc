from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.run_folder.files import find_tokenizer, write_run_files
from pretrain_xla.text.sources import source_of
from pretrain_xla.tokenizers.bitbpe import NUM_PREFIX_TOKENS, BitBPETokenizer
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import decode_after
from pretrain_xla.tokenizers.train import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ["the quick brown fox", "日本語のテキスト。日本の本。", "한국어 텍스트"] * 30
BYTES = BitBPETokenizer("", load_tokenizer("bytes"))
PREFIXES, NINE_BITS = 257, 257 + 64
# Well-formed or not, dense in what is packed, and in end-of-text.
IDS = st.lists(
    st.integers(0, 256) | st.sampled_from([0xE3, 0xE4, 0xEF, 0xF0, 0x80, 0x81, 0xBF, 0xC0, 256]), max_size=60
)


def ids(*tokens):
    return np.array(tokens, np.uint32)


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def base(request, tmp_path_factory):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return train_tokenizer(CORPUS, 340, str(tmp_path_factory.mktemp("base")), kind=request.param)


def test_packing_is_that_of_the_paper():
    """日 is E6 97 A5, 本 is E6 9C AC, あ is E3 81 82: one prefix 0x39 for the first two, then 0x38."""
    expected = []
    for prefix, character in ((True, "日"), (False, "本"), (True, "あ")):
        b1, b2, b3 = character.encode()
        expected += [PREFIXES + (b1 >> 2)] if prefix else []
        expected += [NINE_BITS + ((b1 & 3) << 7 | b2 >> 1), NINE_BITS + ((b2 & 1) << 8 | b3)]
    assert BYTES.encode("日本あ") == expected
    assert BYTES.encode("日a本") == [*expected[:3], ord("a"), *expected[3:5]]  # other tokens leave the prefix in force
    assert len(BYTES.encode("日" * 100)) == 201
    assert (BYTES.vocab_size, BYTES.end_of_text) == (257 + 64 + 512, 256)


@given(tokens=IDS, num_prefix_tokens=st.sampled_from(NUM_PREFIX_TOKENS))
def test_any_bytes_come_back_and_never_get_longer(tokens, num_prefix_tokens):
    tokenizer = BitBPETokenizer("", load_tokenizer("bytes"), num_prefix_tokens)
    packed = tokenizer.pack(ids(*tokens))
    assert tokenizer.unpack(packed).tolist() == tokens
    assert len(packed) <= len(tokens)
    assert packed.max(initial=0) < tokenizer.vocab_size


@given(raw=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_byte_string_comes_back_through_every_base(base, raw):
    tokenizer = BitBPETokenizer("", base)
    spelled = np.array(tokenizer.byte_ids, np.uint32)[np.frombuffer(raw, np.uint8)]
    assert tokenizer.unpack(tokenizer.pack(spelled)).tolist() == spelled.tolist()


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_any_text_comes_back(base, text):
    """But for SentencePiece's own sign for a blank, U+2581, which comes back as one from the base too."""
    tokenizer = BitBPETokenizer("", base)
    assert tokenizer.decode(tokenizer.encode(text)) == base.decode(base.encode(text)) == text


@given(tokens=st.lists(st.integers(0, 257 + 64 + 511), max_size=40))
def test_any_ids_decode(tokens):
    """Whatever a model writes: what is complete is decoded, each pair or half without a prefix is one U+FFFD."""
    text = BYTES.decode(tokens)
    assert text.encode().decode() == text
    assert BYTES.decode([*tokens, 2**40, -1]).endswith("\ufffd\ufffd")


def test_cut_sequences():
    packed = BYTES.encode("日本語")
    assert BYTES.decode(packed[1:]) == "\ufffd\ufffd語"  # no prefix until the one of 語, which is another
    assert BYTES.decode(packed[:-1]) == "日本\ufffd"  # half a pair
    assert decode_after(BYTES, "日", packed[3:]) == "本語"


def test_each_document_has_its_own_prefix():
    packed = BYTES.pack(ids(*"日".encode(), 256, *"日".encode()))
    assert packed.tolist() == [*BYTES.encode("日"), 256, *BYTES.encode("日")]
    # And a prefix is not in force beyond an end-of-text.
    assert BYTES.decode([*BYTES.encode("日"), 256, *BYTES.encode("日")[1:]]) == "日<|endoftext|>\ufffd"


def test_works_as_a_tokenizer_from_a_folder(tmp_path, base):
    BitBPETokenizer("", base, 16).save(str(tmp_path / "a"))
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert isinstance(tokenizer, BitBPETokenizer)
    assert tokenizer.vocab_size == base.vocab_size + 16 + 512
    (tmp_path / "a").rename(tmp_path / "b")
    again = load_tokenizer(str(tmp_path / "b" / "bitbpe.json"))
    assert again.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]
    rare = [*CORPUS, "龍虎の鬱 rare ones"]
    info = prepare(source_of("test", "1", lambda: rare), str(tmp_path / "d"), str(tmp_path / "b"), valid_fraction=0.3)
    assert info.tokenizer == "tokenizer/bitbpe.json"
    tokens = np.concatenate([np.load(tmp_path / "d" / split / "000000.npy") for split in ("train", "valid")])
    documents = load_tokenizer(info.tokenizer_name).decode(tokens).split("<|endoftext|>")
    assert sorted(documents[:-1]) == sorted(rare)
    assert tokens.max() >= base.vocab_size


def test_a_run_keeps_its_own_copy(tmp_path):
    train_tokenizer(CORPUS, 300, str(tmp_path / "bpe"))
    BitBPETokenizer("", load_tokenizer(str(tmp_path / "bpe"))).save(str(tmp_path / "bit"))
    prepare(source_of("test", "1", lambda: CORPUS), str(tmp_path / "data"), str(tmp_path / "bit"), valid_fraction=0.3)
    data = {"train_dir": str(tmp_path / "data/train"), "valid_dir": str(tmp_path / "data/valid")}
    config = build_config({"data": data, "logging": {"run_dir": str(tmp_path / "run")}}, "test")
    (tmp_path / "run").mkdir()
    write_run_files(config)
    for folder in ("bpe", "bit", "data"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-moved")
    kept = find_tokenizer(str(tmp_path / "run" / "checkpoints"))
    assert kept == f"{tmp_path}/run/tokenizer/bitbpe.json"
    assert load_tokenizer(kept).encode("龍") == load_tokenizer(str(tmp_path / "bit-moved")).encode("龍")


def test_faults_are_one_line(tmp_path):
    (tmp_path / "bitbpe.json").write_text('{"base": "bytes"}')
    cases = [
        (lambda: BitBPETokenizer("", load_tokenizer("bytes"), 5), "num_prefix_tokens=5"),
        (lambda: BitBPETokenizer("", BYTES), "BitBPE already"),
        (lambda: load_tokenizer(str(tmp_path)), "damaged"),
        (lambda: BYTES.save(str(tmp_path / "bpe")), "another tokenizer"),
    ]
    train_tokenizer(CORPUS, 300, str(tmp_path / "bpe"))
    for action, message in cases:
        with pytest.raises(UserError, match=message):
            action()


def test_door(tmp_path):
    train_tokenizer(CORPUS, 300, str(tmp_path / "in"))
    words = ["--input_path", tmp_path / "in", "--output_path", tmp_path / "out", "--num_prefix_tokens", "64"]
    command = [sys.executable, "scripts/convert_bpe_to_bitbpe.py", *map(str, words), "--test_conversion"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "200 random byte strings came back" in ended.stdout
    assert json.loads((tmp_path / "out" / "bitbpe.json").read_text()) == {
        "base": "tokenizer.json",
        "num_prefix_tokens": 64,
    }
    command[3] = str(tmp_path / "none")
    fault = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (fault.returncode, fault.stderr.count("\n")) == (2, 1)
