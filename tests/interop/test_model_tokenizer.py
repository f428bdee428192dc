"""The tokenizer in a model's folder: used in any supported format, and never replaced by GPT-2's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import ByteLevelBPETokenizer

from pretrain_xla.errors import UserError
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.interop.load import load_model
from pretrain_xla.interop.model_tokenizer import find_model_tokenizer
from pretrain_xla.interop.tokenizer_files import PROBE
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

from .test_missing_tokenizers import SHAPE

RUSSIAN = ["Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "] * 9
TINY = {**SHAPE, "vocab_size": 50257, "n_embd": 4, "n_head": 2}


@pytest.fixture(scope="module")
def russian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt, as ruGPT-3 has them, and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("russian")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(RUSSIAN, vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<unk>"])
    trained.save_model(str(folder))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).save_pretrained(folder)
    return folder


def find_in(folder: Path):  # type: ignore[no-untyped-def]
    return lambda name: str(folder / name) if (folder / name).is_file() else None


@pytest.mark.parametrize(("vocabulary", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges_are_read_with_the_ids_of_transformers(
    vocabulary: str, merges: str, russian: Path, tmp_path: Path
) -> None:
    reference = transformers.GPT2Tokenizer(str(russian / "vocab.json"), str(russian / "merges.txt"), eos_token="</s>")
    for file in russian.iterdir():
        names = {"vocab.json": vocabulary, "merges.txt": merges}
        (tmp_path / names.get(file.name, file.name)).write_bytes(file.read_bytes())
    name, notes = find_model_tokenizer(find_in(tmp_path), 50257, "here")
    assert (name, notes) == (str(tmp_path / vocabulary), ())
    for found in (str(name), str(tmp_path)):
        ours = load_tokenizer(found)
        assert isinstance(ours, JsonTokenizer)
        assert ours.tokenizer.id_to_token(ours.end_of_text) == "</s>"
        for text in (*RUSSIAN, PROBE):
            assert ours.encode(text) == reference.encode(text)
            assert ours.decode(ours.encode(text)) == text
    assert ours.end_of_text not in ours.encode("</s>")  # text cannot forge the border of a document


def test_it_is_kept_by_import_and_export(russian: Path, tmp_path: Path) -> None:
    import_command([str(russian), str(tmp_path / "run")])
    loaded = load_model(str(tmp_path / "run"))
    assert loaded.tokenizer is not None
    assert load_tokenizer(loaded.tokenizer).encode(RUSSIAN[0]) == load_tokenizer(str(russian)).encode(RUSSIAN[0])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab.txt": "[PAD]"}, "cannot be used here (vocab.txt)"),
        ({"vocab.json": "{}"}, "cannot be used here (vocab.json)"),
        ({"tokenizer.pkl": ""}, "cannot be used here (tokenizer.pkl)"),
        ({"meta.pkl": ""}, "cannot be used here (meta.pkl)"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
            "cannot be used here (tokenizer_config.json)",
        ),
        ({"sentencepiece.bpe.model": ""}, "cannot be used here (sentencepiece.bpe.model)"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}'},
            "its vocab.json is read by CLIPTokenizer alone",
        ),
        (
            {"spiece.model": "", "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizerFast"}'},
            "its spiece.model is read by XLMRobertaTokenizer alone",
        ),
    ],
)
def test_an_unsupported_tokenizer_is_not_replaced_by_gpt2s(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    name, (note,) = find_model_tokenizer(find_in(tmp_path), 50257, "here")
    assert name is None
    assert said in note


def test_gpt2s_is_guessed_only_without_any_tokenizer_and_with_a_note(tmp_path: Path) -> None:
    assert find_model_tokenizer(find_in(tmp_path), 50300, "here") == (None, ())
    name, (note,) = find_model_tokenizer(find_in(tmp_path), 50257, "here")
    assert name == "gpt2"
    assert "here: it came with no tokenizer" in note
    assert "which is a guess" in note


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.model"])
def test_sentencepiece_under_both_of_its_names(file: str, tmp_path: Path) -> None:
    trained = train_tokenizer(RUSSIAN, 300, str(tmp_path / "made"), kind="sentencepiece")
    assert isinstance(trained, SentencePieceTokenizer)
    (tmp_path / file).write_bytes(trained.content)
    name, notes = find_model_tokenizer(find_in(tmp_path), 50257, "here")
    assert (name, notes) == (str(tmp_path / file), ())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    for found in (str(name), str(tmp_path)):
        assert load_tokenizer(found).encode(RUSSIAN[0]) == reference.encode(RUSSIAN[0])


def test_a_vocabulary_that_is_not_byte_level_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(
        UserError, match=r"vocab.json is not byte-level, as GPT-2's is \(it has no token for byte 0x00\)"
    ):
        load_tokenizer(str(tmp_path))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).save_pretrained(tmp_path)
    export_command([str(tmp_path), str(tmp_path / "out")])
    assert "note: its tokenizer is left out: tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()
