from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from pretrain_xla.errors import UserError
from pretrain_xla.prepare.command import train_tokenizer_command
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.sources import source_of
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.load import _warn_deterministic, load_tokenizer
from pretrain_xla.tokenizers.tokenizer import decode_after, is_stored
from pretrain_xla.tokenizers.train import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ["the quick brown fox jumps over the lazy dog", "the dog <|endoftext|> naïve café 日本語 😀"] * 20
HARD = ["", " ", "\n\n\t x", "<|endoftext|>", "a<|endoftext|>b </s> <|im_start|>", "naïve 日本語 😀 \u0000 e\u0301"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(CORPUS, 300, str(tmp_path_factory.mktemp("tokenizer")))


@given(st.text())
def test_bytes_are_lossless_on_any_text(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 256 for token in ids)


def test_bytes_decode_what_is_not_utf8_and_what_is_no_id():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode(np.array([0xE3, 65, 256, 999, -1])) == "\ufffdA<|endoftext|>\ufffd\ufffd"


@given(st.text())
def test_trained_bpe_is_lossless_on_any_text(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.end_of_text not in ids
    assert trained.encode_batch([text, text]) == [ids, ids]


def test_training_is_deterministic_and_learns(trained, tmp_path):
    train_tokenizer(iter(CORPUS), 300, str(tmp_path))
    assert (tmp_path / "tokenizer.json").read_bytes() == (Path(trained.name) / "tokenizer.json").read_bytes()
    assert trained.vocab_size == 300
    assert len(trained.encode("the quick dog")) < len("the quick dog") / 2
    rare = train_tokenizer(["abcabc"], 10_000, str(tmp_path / "rare"), min_frequency=2)
    assert 257 < rare.vocab_size < 300  # as many pairs as there are


def test_trained_bpe_loads_in_transformers(trained):
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast.from_pretrained(trained.name)
    assert other.eos_token_id == trained.end_of_text
    assert other("the lazy fox").input_ids == trained.encode("the lazy fox")


def test_training_door(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(CORPUS))
    command = [sys.executable, "scripts/train_tokenizer.py", "--output-dir", str(tmp_path / "out"), "--source"]
    subprocess.run([*command, str(tmp_path / "text.txt"), "--vocab-size", "280"], cwd=ROOT, check=True)
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer.json")).vocab_size == 280
    fault = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert fault.returncode == 2
    assert fault.stderr.count("\n") == 1
    assert "no such file" in fault.stderr
    with pytest.raises(UserError, match="min_frequency=0"):
        train_tokenizer_command(["--source", str(tmp_path), "--output-dir", str(tmp_path), "--min-frequency", "0"])


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        train_tokenizer(CORPUS, 256, str(tmp_path))


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_ids():
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("gpt2", 50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 995, 50256, 99_999, -1, 2**70]) == "Hello world<|endoftext|>\ufffd\ufffd\ufffd"
    assert load_tokenizer("cl100k_base").vocab_size == 100_277


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_json_gives_the_ids_of_tiktoken(shared):
    ours, theirs = load_tokenizer("gpt2"), load_tokenizer(str(shared("tokenizers/gpt2_hf")))
    text = shared("text/en/wiki.test.raw").read_text()[:200_000]
    texts = [*HARD, text, "日本語のテキスト。" * 20]
    assert ours.encode_batch(texts) == theirs.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert [theirs.encode(text) for text in texts] == ours.encode_batch(texts)
    assert [theirs.decode(ids) for ids in theirs.encode_batch(texts)] == texts
    assert (theirs.vocab_size, theirs.end_of_text) == (50257, 50256)
    assert ours.end_of_text not in ours.encode("<|endoftext|>")


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_vectors_of_llama_cpp(shared):
    folder = shared("tokenizers/gpt2_test_vectors")
    texts = (folder / "ggml-vocab-gpt-2.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    wanted = (folder / "ggml-vocab-gpt-2.gguf.out").read_text().splitlines()
    assert len(wanted) > 40
    got = load_tokenizer("gpt2").encode_batch(texts)[: len(wanted)]
    assert got == [[int(token) for token in line.split()] for line in wanted]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sentencepiece"))
    return train_tokenizer(CORPUS, 330, folder, kind="sentencepiece", special_tokens=["<|user|>"])


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_trained_sentencepiece_is_lossless_on_any_text(spiece, text):
    ids = spiece.encode(text)
    assert spiece.decode(ids) == text
    assert spiece.end_of_text not in ids
    assert spiece.encode_batch([text, text]) == [ids, ids]


def test_trained_sentencepiece(spiece, tmp_path):
    again = train_tokenizer(iter(CORPUS), 330, str(tmp_path), kind="sentencepiece", special_tokens=["<|user|>"])
    assert again.content == spiece.content
    assert (spiece.vocab_size, spiece.end_of_text) == (330, 1)
    assert len(spiece.encode("the quick dog")) < len("the quick dog")
    assert len(spiece.encode("<|user|>")) > 1
    assert spiece.decode([*spiece.encode("a b"), 1, 2, 2, *spiece.encode("c"), 999, -1]) == (
        "a b<|endoftext|><|user|><|user|>c\ufffd\ufffd"
    )
    assert len(set(spiece.byte_ids)) == 256


@pytest.mark.parametrize("name", ["sentencepiece_4096.model", "sentencepiece_32000.model"])
def test_sentencepiece_model_gives_the_ids_of_the_reference(shared, tmp_path, name):
    """The reference is given the file's path, as its command line does; ours reads bytes, from any URL."""
    path = shared(f"tokenizers/{name}")
    ours, reference = load_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*HARD, *CORPUS[:2], shared("text/en/wiki.test.raw").read_text()[:100_000]]
    wanted = [reference.encode(text) for text in texts]
    assert ours.encode_batch(texts) == wanted == [ours.encode(text) for text in texts]
    assert [ours.decode(ids) for ids in wanted] == [reference.decode(ids) for ids in wanted]
    assert (ours.vocab_size, ours.end_of_text) == (reference.get_piece_size(), reference.eos_id())
    ours.save(str(tmp_path))
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    assert load_tokenizer(str(tmp_path)).encode(texts[-1]) == wanted[-1]


def test_continuation_is_decoded_with_what_came_before(shared):
    """Llama's kind of model takes the first space of a text away; in a continuation it has to stay."""
    tokenizer = load_tokenizer(str(shared("tokenizers/sentencepiece_4096.model")))
    before, whole = tokenizer.encode("Once upon"), tokenizer.encode("Once upon a time")
    assert tokenizer.decode(whole[len(before) :]) == "a time"
    assert decode_after(tokenizer, "Once upon", whole[len(before) :]) == " a time"


def test_special_tokens_lines_and_their_limits(tmp_path):
    named = train_tokenizer(CORPUS, 300, str(tmp_path / "a"), special_tokens=["<|user|>", "<|endoftext|>", "<|user|>"])
    assert [named.tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|user|>")] == [0, 1]
    assert 1 not in named.encode("<|user|>")
    assert named.decode([1]) == "<|user|>"
    text = "".join(f"word{number} " * 20 + "\n" for number in range(100))
    for kind, size in (("bpe", 300), ("sentencepiece", 270)):
        first = train_tokenizer([text[: len(text) // 2], text], size, str(tmp_path / kind), kind=kind, max_lines=3)
        only = train_tokenizer(["\n".join(text.split("\n")[:3]) + "\n"], size, str(tmp_path / f"{kind}3"), kind=kind)
        assert first.content == only.content
    for arguments, message in [
        ({"vocab_size": 257, "special_tokens": ["<|user|>"]}, "need 258"),
        ({"vocab_size": 100_000, "kind": "sentencepiece"}, "Vocabulary size too high"),
        ({"vocab_size": 300, "max_lines": 0}, "max_lines=0"),
        ({"vocab_size": 300, "min_frequency": 0}, "min_frequency=0"),
        ({"vocab_size": 300, "min_frequency": -1}, "min_frequency=-1"),
        *[
            ({"vocab_size": 300, "special_tokens": [token]}, "text could give it")
            for token in ("", "a", "quick", "Ġfox")
        ],
    ]:
        with pytest.raises(UserError, match=message):
            train_tokenizer(CORPUS, output_dir=str(tmp_path / "x"), **arguments)


def test_a_folder_holds_one_tokenizer_and_is_looked_at_before_any_text(tmp_path):
    train_tokenizer(CORPUS, 330, str(tmp_path))
    unread = (pytest.fail("text was read") for _ in range(1))
    with pytest.raises(UserError, match=r"holds another tokenizer \(tokenizer.json\)"):
        train_tokenizer(unread, 330, str(tmp_path), kind="sentencepiece")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written"):
        train_tokenizer(unread, 330, str(tmp_path / "file" / "out"))


def word_level(folder, *words, **files):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_usual_end_of_text_tokens_are_found(tmp_path, end):
    word_level(tmp_path, "a", "b", end)
    assert load_tokenizer(str(tmp_path)).end_of_text == 2


@pytest.mark.parametrize("stated", ["b", {"content": "b"}])
def test_stated_end_of_text_comes_first_and_survives_a_copy(tmp_path, stated):
    word_level(tmp_path, "a", "b", "</s>", special_tokens_map={"eos_token": stated})
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    tokenizer.save(str(tmp_path / "copy"))
    assert tokenizer.end_of_text == load_tokenizer(str(tmp_path / "copy")).end_of_text == 1


def test_end_of_text_that_the_file_calls_ordinary_cannot_be_forged(tmp_path, trained):
    tree = json.loads((Path(trained.name) / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token["special"] = False
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_faults_are_one_line(tmp_path, monkeypatch):
    word_level(tmp_path, "a", "b")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "bad.model").write_bytes(b"no protocol buffer")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path): "no end-of-text token",
        str(tmp_path / "bad"): "cannot be read",
        str(tmp_path / "empty"): "no bitbpe.json or tokenizer.json or tokenizer.model",
        str(tmp_path / "none.json"): "no such file",
        str(tmp_path / "bad.model"): "no SentencePiece model",
        "gtp2": "did you mean gpt2",
        "zzzzzz": "known names are gpt2",
        "nosuch://x/y": "nosuch",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_no_network_says_how_to_do_without(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def test_a_name_on_the_hub_is_answered_with_how_to_fetch_it():
    with pytest.raises(UserError, match=r"hf download owner/name .* --local-dir tokenizers/owner/name"):
        load_tokenizer("owner/name")
    with pytest.raises(UserError) as error:
        load_tokenizer("./owner/name")
    assert "hf download" not in str(error.value)


HOSTILE = [r"(x+x+)+y", r"(a|a)*$", r"(\w|\w\w)+#", "(((a{0,900}){0,900}){0,900}){0,900}b"]
USUAL = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def test_a_regular_expression_that_does_not_finish_is_one_line(tmp_path):
    """Tried in a child process before it is used; one that passes there ends in one line on the text where it fails."""
    train_tokenizer(["abc " * 9], 260, str(tmp_path), min_frequency=1)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())

    def with_patterns(*patterns):
        splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
        steps = [*splits, tree["pre_tokenizer"]]
        return json.dumps(tree | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})

    path.write_text(with_patterns(*USUAL))
    assert load_tokenizer(str(path)).decode(load_tokenizer(str(path)).encode("Hello  World 123")) == "Hello  World 123"
    for pattern in HOSTILE:
        path.write_text(with_patterns(USUAL[0], pattern))
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"its regular expression .* unlimited time or memory") as error:
            load_tokenizer(str(path))
        assert repr(pattern[:60]) in str(error.value)
        assert time.monotonic() - begun < 30
    slipped = JsonTokenizer.of("slipped", with_patterns(r"(q+q+)+y"), "<|endoftext|>")
    for action in (lambda: slipped.encode("q" * 64), lambda: slipped.encode_batch(["q" * 64])):
        with pytest.raises(UserError, match=r"'slipped': cannot go on \(.*retry-limit"):
            action()


def test_replacements_that_lengthen_the_text_without_limit(tmp_path):
    """Ten that each make ten characters of one would make 10**10 of it."""
    train_tokenizer(["abc " * 9], 260, str(tmp_path), min_frequency=1)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    for key, list_key in (("normalizer", "normalizers"), ("decoder", "decoders")):
        steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 10
        path.write_text(json.dumps(tree | {key: {"type": "Sequence", list_key: steps}}))
        with pytest.raises(UserError, match="its replacements of text fail, or take unlimited time or memory"):
            load_tokenizer(str(path))
    steps = [{"type": "Replace", "pattern": {"String": f"b{n}"}, "content": "c" * 10} for n in range(10)]
    path.write_text(json.dumps(tree | {"normalizer": {"type": "Sequence", "normalizers": steps}}))
    assert load_tokenizer(str(path)).encode("abc")  # none makes another's text


def test_a_sentencepiece_model_without_byte_tokens_is_a_file_like_another(shared, tmp_path):
    t5 = load_tokenizer(str(shared("tokenizers/sentencepiece_32000.model")))
    with pytest.raises(UserError, match="no token for each single byte"):
        t5.byte_ids  # noqa: B018
    assert is_stored(t5)
    assert not is_stored(load_tokenizer("bytes"))
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The house number {number} is not far." for number in range(40)))
    info = prepare(str(text), str(tmp_path / "data"), t5.name, num_workers=1, progress=False)
    assert (info.tokenizer, info.vocab_size) == ("tokenizer/tokenizer.model", t5.vocab_size)


END = "</s>"
UNIGRAM = {"unk_id": 0, "vocab": [["<unk>", 0], [END, -1], ["▁a", -2], *([char, -4] for char in "ab<>/s▁")]}
WORDS = {"[UNK]": 0, END: 1, "a": 2, "b": 3, "<": 4, "/": 5, "s": 6, ">": 7}
MERGED = {"a": 0, "b": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</": 6, "s>": 7, END: 8, " ": 9}
MODELS = {
    "Unigram": UNIGRAM,
    "WordLevel": {"vocab": WORDS, "unk_token": "[UNK]"},
    "WordPiece": {"vocab": WORDS, "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 9},
    "BPE": {"vocab": MERGED, "merges": [["<", "/"], ["s", ">"], ["</", "s>"]]},
    "BPE that looks words up": {"vocab": MERGED, "merges": [["<", "/"]], "ignore_merges": True},
}


def json_tokenizer(folder, name, declared=True, **changes):
    added = {
        "id": 1,
        "content": END,
        "special": True,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    kind = name.split()[0]
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None, "post_processor": None,
        "added_tokens": [added | {"id": 8 if kind == "BPE" else 1}] if declared else [],
        "pre_tokenizer": cut if kind == "Unigram" else {"type": "WhitespaceSplit"},
        "model": {"type": kind, **MODELS[name], **changes},
    }  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_text_cannot_forge_the_end_of_a_document(tmp_path, kind, declared):
    tokenizer = json_tokenizer(tmp_path / "own", kind, declared)
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        for text in (END, f"a {END} b", f"a{END}b", f"\ufdd0{END}", f"a \ufdd0{END} {END}{END}"):
            ids = one.encode(text)
            assert ids, "nothing is left out"
            assert one.end_of_text not in ids
            assert one.encode_batch([text]) == [ids]
        assert one.encode("a b")[-1] == one.tokenizer.token_to_id("b"), "other text is as it was"
        assert one.decode([one.end_of_text]) == END
    tokenizer.save(str(tmp_path / "copy"))
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert (copy.content, copy.encode(f"a {END}")) == (tokenizer.content, tokenizer.encode(f"a {END}"))


def test_unknown_text_does_not_end_a_document(tmp_path):
    with pytest.raises(UserError, match="both the end of a text and the token for unknown text"):
        json_tokenizer(tmp_path / "own", "WordLevel", unk_token=END)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_stochastic_encoding_is_turned_off_and_said(tmp_path, caplog, kind):
    chance = {"dropout": 0.5} if kind == "BPE" else {"nbest_size": 8, "alpha": 0.1}
    _warn_deterministic.cache_clear()
    tokenizer = json_tokenizer(tmp_path / "own", kind, **chance)
    assert len({tuple(tokenizer.encode("a a </ </ s> a aaaa")) for _ in range(50)}) == 1
    assert ["stochastic encoding (dropout) is turned off" in record.getMessage() for record in caplog.records] == [True]
    assert (
        "dropout" not in tokenizer.content.decode()
        or json.loads(tokenizer.tokenizer.to_str())["model"]["dropout"] is None
    )


def test_a_damaged_copy_of_a_datasets_tokenizer_is_refused(tmp_path, trained):
    """Also where a fingerprint says nothing: in the entry of a rare word."""
    text = source_of("t", "1", lambda: ["ein Text ", "a text"] * 50)
    prepare(text, str(tmp_path / "d"), trained.name, valid_fraction=0.3, num_workers=1)
    folder = tmp_path / "d" / "tokenizer"
    loaded = load_tokenizer(str(folder))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        raw = (folder / name).read_bytes()
        at = raw.rindex(b"t")
        (folder / name).write_bytes(raw[:at] + b"u" + raw[at + 1 :])
        for named in (folder, folder / "tokenizer.json"):
            with pytest.raises(
                UserError, match=rf"{name} is missing, or differs from its checksum in SHA256SUMS: copy"
            ):
                load_tokenizer(str(named))
        (folder / name).write_bytes(raw)
    assert load_tokenizer(str(folder)).content == loaded.content
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    prepare(text, str(tmp_path / "d"), "bytes", valid_fraction=0.3, num_workers=1, overwrite=True)
    assert not list(folder.parent.glob("tokenizer/*"))  # nothing of the former is left
