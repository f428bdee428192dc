"""An export opens in plain `transformers`, computes the same there, and is imported back bit for bit."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain_xla.config import ModelConfig, build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.interop.architecture_options import PLAIN, allowed, architecture_options
from pretrain_xla.interop.config_json import choose_family, write_config
from pretrain_xla.interop.export import export_model
from pretrain_xla.interop.families import FAMILIES, Family
from pretrain_xla.interop.load import LoadedModel, load_model
from pretrain_xla.interop.tensors import to_hugging_face
from pretrain_xla.model import GPT

from .conftest import (
    TINY,
    assert_same_greedy,
    assert_same_logits,
    assert_same_tensors,
    build,
    open_in_transformers,
    tiny,
    tokens,
)

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "gated": True, "activation": "silu", "bias": False}
GEMMA = LLAMA | {"norm": "rmsnorm_zero_centered", "activation": "gelu", "scale_embeddings": True, "tie_weights": True}
# For each architecture, a model that goes there, with its options away from their defaults.
EXAMPLES: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": False, "activation": "gelu_exact", "norm_eps": 1e-3},
    "llama": LLAMA | {"num_kv_heads": 2, "head_dim": 10, "bias": True, "rope_theta": 500.0},
    "qwen3": LLAMA | {"d_model": 30, "num_kv_heads": 2, "head_dim": 10, "qk_norm": True, "tie_weights": True},
    "gemma": GEMMA | {"num_kv_heads": 1, "head_dim": 8},
    "gemma2": GEMMA | {"post_norm": True, "attention_softcap": 0.7, "logit_softcap": 1.5, "query_scale": 0.25},
    "granite": LLAMA | {"scale_embeddings": True, "query_scale": 0.3, "bias": True},
    "starcoder2": {"positions": "rotary", "num_kv_heads": 2, "rope_theta": 500.0},
    "stablelm": {"positions": "rotary", "gated": True, "activation": "silu", "bias": False, "num_kv_heads": 2},
    "gpt_bigcode": {"num_kv_heads": 1, "tie_weights": True},
    "arcee": LLAMA | {"gated": False, "activation": "relu2", "head_dim": 10},
    "smollm3": LLAMA | {"positions": "none", "num_kv_heads": 2, "bias": True},
    "apertus": LLAMA | {"gated": False, "activation": "relu2", "qk_norm": True},
    "vaultgemma": GEMMA | {"attention_softcap": 0.7, "logit_softcap": 1.5},
    "gemma3_text": GEMMA | {"post_norm": True, "qk_norm": True, "rope_theta": 500.0, "logit_softcap": 1.5},
    "hyperclovax": LLAMA | {"post_norm": True, "query_scale": 0.3, "scale_embeddings": True, "head_dim": 10},
}


def export(model: GPT, folder: Path, **keywords: Any) -> Path:
    loaded = LoadedModel(model.config, dict(model.named_parameters()), None, "test")
    export_model(loaded, str(folder), **keywords)
    return folder


def check(config: ModelConfig, folder: Path, seed: int = 0, *, greedy: bool = True) -> None:
    """The export computes the same in `transformers`, and importing it gives the same bits and config."""
    config = config.model_copy(update={"seq_length": 40})
    model = build(config, seed)
    export(model, folder)
    theirs = open_in_transformers(folder)
    assert_same_logits(model, theirs)
    for length in (3, 7) if greedy else ():
        assert_same_greedy(model, theirs, tokens(config.vocab_size, length, rows=1))
    back = load_model(str(folder))
    assert back.config == config
    assert_same_tensors(back.tensors, model)


def test_every_architecture_has_an_example() -> None:
    assert set(EXAMPLES) == {family.model_type for family in FAMILIES if family.exported}


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_architecture(name: str, tmp_path: Path) -> None:
    config = tiny(**EXAMPLES[name])
    assert choose_family(config).model_type == name
    check(config, tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_ready_config_shrunk(path: Path, tmp_path: Path) -> None:
    config = build_config(load_yaml(str(path)), str(path)).model
    groups = config.num_heads // config.kv_heads
    heads = 2 * groups if groups > 1 else 3
    head_dim = None if config.head_dim is None else 10
    smaller = {
        "vocab_size": 61,
        "seq_length": 12,
        "d_model": 8 * heads,
        "num_layers": 2,
        "num_heads": heads,
        "num_kv_heads": heads // groups if config.num_kv_heads else None,
        "head_dim": head_dim,
        "d_ff": 40,
        "vocab_multiple": 16,
        # Export folds the norm away, which has a test of its own, and no file says how weights were initialised.
        "embedding_norm": False,
        "init": "gpt2",
    }
    if config.query_scale is not None:
        smaller["query_scale"] = config.query_scale
    config = config.model_copy(update=smaller)
    if path.stem == "speedrun_124m":
        with pytest.raises(UserError, match=r"logit_softcap=15\.0 stands in the way") as refusal:
            choose_family(config)
        assert "it would be qwen3" in str(refusal.value)
        return
    check(config, tmp_path)


CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", "gelu_exact", "relu", "relu2", "silu"),
    "gated": (True, False),
    "norm": ("rmsnorm", "layernorm", "rmsnorm_zero_centered"),
    "norm_eps": (1e-6, 1e-5, 1e-3),
    "post_norm": (False, True),
    "positions": ("rotary", "learned", "none"),
    "rope_theta": (10_000.0, 500.0),
    "bias": (False, True),
    "qk_norm": (False, True),
    "query_scale": (None, 0.25, 0.3),
    "attention_softcap": (None, 0.7),
    "logit_softcap": (None, 1.5),
    "scale_embeddings": (False, True),
    "tie_weights": (True, False),
    "num_kv_heads": (None, 2, 1),
    "head_dim": (None, 10),
    "num_heads": (4, 2),
    "vocab_size": (61, 64),
    "d_model": (24, 32),
}


def draw(chance: random.Random, choices: dict[str, tuple[Any, ...]] = CHOICES) -> ModelConfig:
    """A model that has an architecture, with some of its options changed at random, or all of them at random."""
    corner = chance.choice([{}, *EXAMPLES.values()])
    options = {key: chance.choice(values) for key, values in choices.items() if not corner or chance.random() < 0.15}
    options = TINY | corner | options
    if options["d_model"] % options["num_heads"]:
        options["head_dim"] = 10
    return ModelConfig.model_validate(options)


def in_transformers(model: GPT, family: Family) -> Any:
    """The model as its export describes it, without files."""
    tree = write_config(family, model.config) | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))
    tensors = to_hugging_face(dict(model.named_parameters()), model.config, family.layout)
    report = theirs.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"lm_head.weight"} if model.config.tie_weights else not report.missing_keys
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.exported], ids=lambda row: row.model_type)
def test_no_option_of_a_row_is_ignored_by_transformers(family: Family) -> None:
    """Each value that a row accepts of each option gives the same logits, also where an earlier row would be chosen."""
    example = TINY | EXAMPLES[family.model_type]
    changes = [{}, *({name: value} for name in CHOICES for value in CHOICES[name] if name != "vocab_size")]
    changes += [{"d_model": 30, "head_dim": 10}, {"d_model": 30, "num_heads": 2, "head_dim": None}]
    compared = 0
    for change in changes:
        try:
            config = ModelConfig.model_validate(example | change)
        except ValueError:
            continue  # such as an odd head_dim with rotary positions
        have = architecture_options(config)
        if all(allowed(family.options.get(name, PLAIN[name]), value) for name, value in have.items()):
            model = build(config)
            assert_same_logits(model, in_transformers(model, family))
            compared += 1
    assert compared > 10


def test_random_options(tmp_path: Path) -> None:
    """A random config is exported, agrees and is read back; or the error names a change that makes it exportable."""
    chance, reached, refused = random.Random(11), Counter[str](), 0
    for index in range(150):
        config = draw(chance)
        try:
            family = choose_family(config)
        except UserError:
            refused += 1
            continue
        if reached[family.model_type] < 6:  # the common ones would only take time
            check(config, tmp_path / str(index), seed=index, greedy=not reached[family.model_type])
        reached[family.model_type] += 1
    assert len(reached) == len(EXAMPLES), reached
    assert refused > 10


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_norm_of_untied_embeddings_is_folded_into_them(norm: str, tmp_path: Path) -> None:
    config = tiny(**(EXAMPLES["qwen3"] if norm == "rmsnorm" else {}), embedding_norm=True)
    model = build(config.model_copy(update={"tie_weights": False}))
    assert_same_logits(model, open_in_transformers(export(model, tmp_path / "folded")))
    again = load_model(str(tmp_path / "folded"))
    assert not again.config.embedding_norm
    with pytest.raises(UserError, match="embedding_norm=True stands in the way"):
        export(build(config.model_copy(update={"tie_weights": True})), tmp_path / "tied")


@pytest.mark.parametrize(
    ("options", "says", "fix", "then"),
    [
        (LLAMA | {"logit_softcap": 1.5}, "logit_softcap=1.5 stands in the way", {"logit_softcap": None}, "llama"),
        (LLAMA | {"bias": True, "qk_norm": True}, "qk_norm=True stands in the way", {"qk_norm": False}, "llama"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 stands in the way", {"num_kv_heads": None}, "gpt2"),
        (GEMMA | {"scale_embeddings": False}, "scale_embeddings=False stands", {"scale_embeddings": True}, "gemma"),
        (
            {"num_kv_heads": 2, "attention_softcap": 2.0},
            "attention_softcap=2.0 and num_kv_heads=2 stand in the way",
            {"attention_softcap": None, "num_kv_heads": None},
            "gpt2",
        ),
        (
            GEMMA | {"post_norm": True, "qk_norm": True, "attention_softcap": 0.7},
            "qk_norm=True stands in the way; with qk_norm off it",
            {"qk_norm": False},
            "gemma2",
        ),
        (  # 6 heads divide d_model, and would be 5 wide
            {"positions": "rotary", "d_model": 30, "num_heads": 7, "head_dim": 4},
            "with head_dim left at its default and num_heads 5 it",
            {"head_dim": None, "num_heads": 5},
            "starcoder2",
        ),
        (  # 3 heads divide d_model, and cannot share 2 key/value heads
            LLAMA | {"d_model": 30, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "num_heads=4 stands in the way; with num_heads 2 it",
            {"num_heads": 2},
            "llama",
        ),
        (
            LLAMA | {"positions": "none", "d_model": 30, "num_heads": 2},
            "head_dim=None stands in the way; with head_dim 16 it",
            {"head_dim": 16},
            "smollm3",
        ),
        (
            {"positions": "rotary", "head_dim": 10, "query_scale": 10**-0.5},
            "with head_dim left at its default and query_scale left at its default it",
            {"head_dim": None, "query_scale": None},
            "starcoder2",
        ),
        (
            {"num_kv_heads": 1, "tie_weights": True, "post_norm": True},
            "post_norm off it",
            {"post_norm": False},
            "gpt_bigcode",
        ),
    ],
)
def test_a_config_without_an_architecture_names_one_and_the_fix(
    options: dict[str, Any], says: str, fix: dict[str, Any], then: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_family(tiny(**options))
    line = str(caught.value)
    assert says in line
    assert f"it would be {then} (" in line
    assert "\n" not in line
    assert choose_family(tiny(**(options | fix))).model_type == then


def test_the_smallest_fix_named_is_enough(tmp_path: Path) -> None:
    """Options as the error words them, tried: what it promises holds, also where widths do not divide evenly."""
    chance = random.Random(5)
    words = {"left at its default": None, "on": True, "off": False, "1 / sqrt of a whole number": 0.25}
    uneven = {"num_heads": (4, 6, 7), "d_model": (24, 30), "head_dim": (None, 5, 10), "query_scale": (None, 10**-0.5)}
    tried = 0
    while tried < 200:
        try:
            config = draw(chance, CHOICES | uneven)
        except ValueError:
            continue
        try:
            choose_family(config)
        except UserError as error:
            fixes, family = str(error).split("; with ")[1].split(" it would be ")
            changes = {}
            for fix in fixes.split(" and "):
                option, wanted = fix.split(" ", 1)
                changes[option] = int(wanted) if wanted.isdigit() else words.get(wanted, wanted)
            assert (
                choose_family(ModelConfig.model_validate(config.model_dump() | changes)).model_type == family.split()[0]
            )
            tried += 1


def test_large_weights_are_split_and_found_again(tmp_path: Path) -> None:
    model = build(tiny(tie_weights=True))
    export(model, tmp_path, shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_logits(model, open_in_transformers(tmp_path))
    assert_same_tensors(load_model(str(tmp_path)).tensors, model)


def test_half_precision_on_request(tmp_path: Path) -> None:
    model = build(tiny(**LLAMA))
    export(model, tmp_path, dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert open_in_transformers(tmp_path).dtype == torch.bfloat16
    loaded = load_model(str(tmp_path)).tensors
    assert torch.equal(loaded["embedding.weight"][:61], model.embedding.weight[:61].bfloat16().float())


def test_padding_is_cropped(tmp_path: Path) -> None:
    model = build(tiny())
    assert model.embedding.weight.shape[0] == 64
    export(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape[0] == 61


def test_gpt2_has_the_length_under_the_name_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    export(build(tiny()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["n_ctx"]) == (["GPT2LMHeadModel"], config["n_positions"])


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(build(tiny()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_biases_learnt_elsewhere_are_not_dropped(tmp_path: Path) -> None:
    """Exported without biases to GPT-2, where they are zeros, and trained there: they are no longer zero."""
    export(build(tiny(bias=False)), tmp_path)
    theirs = open_in_transformers(tmp_path)
    theirs.transformer.ln_f.bias.data += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'transformer.ln_f.bias' has no place .* delete `pretrain_xla` in its config"):
        load_model(str(tmp_path))
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["pretrain_xla"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    loaded = load_model(str(tmp_path))
    assert loaded.config.bias
    ours = GPT(loaded.config)
    ours.load_state_dict(loaded.tensors)
    assert_same_logits(ours, theirs)


def test_an_edited_config_is_believed_over_our_own_copy_of_it(tmp_path: Path) -> None:
    export(build(tiny(**LLAMA)), tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["rms_norm_eps"] = 0.01
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert load_model(str(tmp_path)).config.norm_eps == 0.01


def test_the_model_card_shows_a_tokenizer_only_where_there_is_one(tmp_path: Path) -> None:
    folder = export(build(tiny(), 0), tmp_path / "out")
    assert not (folder / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (folder / "README.md").read_text()
