"""Special tokens before and after a text: used for models trained with them, and never added to others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors

from pretrain_xla.errors import UserError
from pretrain_xla.generate import Generator, Request, Sampling
from pretrain_xla.interop.command import import_command
from pretrain_xla.interop.export import export_model
from pretrain_xla.interop.load import load_model
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

from .test_missing_tokenizers import SHAPE

BEGIN, END, OTHER_END = 1, 0, 7


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts `<s>` before a text, that has two ids which end one, and rows that no token has."""
    folder = tmp_path_factory.mktemp("theirs")
    train_tokenizer(["a cat and a dog\n" * 9], 260, str(folder), special_tokens=["<s>"])
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SHAPE, "vocab_size": 700}, bos_token_id=BEGIN, eos_token_id=[END, OTHER_END])
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Generator:
    return Generator.load(str(folder), tokenizer=None, runtime="torch", device="cpu")


def ids_in_transformers(folder: Path, text: str) -> list[int]:
    ids: list[int] = transformers.AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"]
    return ids


def test_an_imported_model_gets_its_special_tokens(theirs: Path, tmp_path: Path) -> None:
    wanted = ids_in_transformers(theirs, "a cat")
    assert wanted[0] == BEGIN
    import_command([str(theirs), str(tmp_path / "run")])
    for folder in (theirs, tmp_path / "run"):
        generator = load(folder)
        assert generator.prompt_ids("a cat") == wanted
        assert generator.prompt_ids("") == [BEGIN]
        assert generator.prompt_ids("<|endoftext|>a cat") == [BEGIN, END, *wanted[1:]]
        generator.runtime.close()


def test_a_tokenizer_that_says_that_it_adds_nothing(theirs: Path, tmp_path: Path) -> None:
    for file in theirs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = json.loads((theirs / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": False}))
    import_command([str(tmp_path), str(tmp_path / "run")])
    for folder in (tmp_path, tmp_path / "run"):
        loaded = load_model(str(folder))
        assert not loaded.adds_bos
        assert loaded.eos_ids == (END, OTHER_END)


def test_every_id_that_ends_a_text_ends_it(theirs: Path) -> None:
    generator = load(theirs)
    with torch.no_grad():
        table = generator.model.get_parameter("embedding.weight")
        table[:] = 0
        # The likeliest token everywhere, whatever the text: the norm's bias is what the head sees most of.
        generator.model.get_parameter("final_norm.bias").fill_(10)
        table[OTHER_END] = 1
    assert list(generator.tokens(["a cat"], Request(5, Sampling(temperature=0)))) == []
    generator.runtime.close()


def test_ids_that_the_tokenizer_does_not_have_are_not_drawn(theirs: Path) -> None:
    generator = load(theirs)
    known = generator.tokenizer.vocab_size
    assert known < generator.model.config.vocab_size
    for sampling in (Sampling(), Sampling(top_k=10**6), Sampling(repetition_penalty=1.5)):
        drawn = [token for _, token in generator.tokens(["a cat", "a"], Request(30, sampling))]
        assert drawn
        assert max(drawn) < known
    generator.runtime.close()


def test_an_export_keeps_the_special_tokens(theirs: Path, tmp_path: Path) -> None:
    loaded = load_model(str(theirs))
    assert export_model(loaded, str(tmp_path / "again")) == []
    assert ids_in_transformers(tmp_path / "again", "a cat") == ids_in_transformers(theirs, "a cat")
    said = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert said == {"bos_token_id": BEGIN, "eos_token_id": [END, OTHER_END]}
    # Trained by us with the same tokenizer, nothing ever stood before a text.
    assert export_model(replace(loaded, adds_bos=False, eos_ids=()), str(tmp_path / "ours")) == []
    assert ids_in_transformers(tmp_path / "ours", "a cat") == load_tokenizer(str(theirs)).encode("a cat")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["bos_token_id"] == END
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours")).bos_token_id == END


def copy(theirs: Path, folder: Path, **config: object) -> dict[str, torch.Tensor]:
    for file in theirs.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | config))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_not_read_as_numbers(dtype: torch.dtype, theirs: Path, tmp_path: Path) -> None:
    tensors = copy(theirs, tmp_path)
    name = next(name for name in tensors if name.endswith("mlp.c_fc.weight"))
    save_file(tensors | {name: (100 * tensors[name]).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}' holds {str(dtype)[6:]}: it is quantised; name the model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"config\.json: quantised weights \(gptq\): name the model",
        ),
        ({"n_embd": "8"}, r"config\.json: n_embd is text, '8', where a number is expected"),
    ],
)
def test_a_config_that_means_something_else(
    config: dict[str, object], words: str, theirs: Path, tmp_path: Path
) -> None:
    copy(theirs, tmp_path, **config)
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path))


def test_a_tied_table_under_the_name_of_the_head(theirs: Path, tmp_path: Path) -> None:
    tensors = copy(theirs, tmp_path)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = load_model(str(theirs)).tensors
    found = load_model(str(tmp_path)).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"an adapter \(LoRA and its like\), which is not a model: merge it"):
        load_model(str(tmp_path))
