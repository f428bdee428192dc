"""The config tree: what it refuses, with which message, and that a written config reads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pretrain_xla.config import LEAVES, RunConfig, build_config
from pretrain_xla.config_file import load_yaml, to_yaml
from pretrain_xla.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def sections() -> dict[str, type[BaseModel]]:
    """Class of each section by name, without using `LEAVES`."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        found[name] = field.annotation
    return found


def refusal(tree: dict[str, Any], where: str = "my.yaml") -> str:
    """The one-line error of a config tree."""
    with pytest.raises(UserError) as caught:
        build_config(tree, where)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{where}: ")
    return line


def test_a_setting_is_in_one_section_only() -> None:
    names = [leaf for section in sections().values() for leaf in section.model_fields]
    assert len(LEAVES) == len(names) == len(set(names))
    assert not set(names) & {"config", "print_config", "help"}, "taken by the command line itself"
    assert all(leaf in sections()[section].model_fields for leaf, section in LEAVES.items())


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_setting_has_a_description(leaf: str) -> None:
    description = sections()[LEAVES[leaf]].model_fields[leaf].description
    assert description
    assert description.strip().endswith((".", ")"))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"model": {"d_modle": 64}}, "my.yaml: unknown key 'model.d_modle'; did you mean 'd_model'?"),
        ({"mdel": {"d_model": 64}}, "my.yaml: unknown key 'mdel'; did you mean 'model'?"),
        ({"optim": {"learningrate": 1}}, "my.yaml: unknown key 'optim.learningrate'; did you mean 'learning_rate'?"),
        (
            {"model": {"learning_rate": 3e-4}},
            "my.yaml: key 'model.learning_rate' is in the wrong place: it belongs under 'optim'",
        ),
        ({"d_model": 64}, "my.yaml: key 'd_model' is in the wrong place: it belongs under 'model'"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(tree: dict[str, Any], expected: str) -> None:
    assert refusal(tree) == expected


def test_an_unknown_key_without_a_suggestion_lists_the_known_ones() -> None:
    line = refusal({"data": {"qqqqqq": 1}})
    assert "unknown key 'data.qqqqqq'" in line
    assert all(leaf in line for leaf in sections()["data"].model_fields)


@pytest.mark.parametrize(
    ("section", "leaf", "value", "expected"),
    [
        ("model", "d_model", "wide", "integer"),
        ("model", "d_model", 64.5, "integer"),
        ("model", "d_model", 0, "greater than 0"),
        ("model", "d_model", None, "integer"),
        ("model", "dropout", 1.0, "less than 1"),
        ("model", "dropout", -0.1, "greater than or equal to 0"),
        ("model", "activation", "tanh", "'relu2'"),
        ("model", "tie_weights", "perhaps", "boolean"),
        ("data", "tokenizer", 5, "string"),
        ("optim", "learning_rate", "fast", "number"),
        ("optim", "learning_rate", float("nan"), "Input should be"),
        ("optim", "betas", 0.9, "tuple"),
        ("train", "mixed_precision", "fp32", "'bf16' or 'fp16'"),
        ("train", "seed", -1, "greater than or equal to 0"),
        ("parallel", "mesh_data", -2, "greater than or equal to -1"),
        ("checkpoint", "resume", "maybe", "boolean"),
        ("wandb", "wandb_tags", "one", "tuple"),
    ],
)
def test_a_bad_value_is_named_with_its_key(section: str, leaf: str, value: Any, expected: str) -> None:
    line = refusal({section: {leaf: value}})
    assert f"{section}.{leaf}={value!r}: " in line
    assert expected in line


def test_no_number_is_infinite() -> None:
    numbers = [leaf for leaf, name in LEAVES.items() if sections()[name].model_fields[leaf].annotation is float]
    assert "learning_rate" in numbers
    for leaf in numbers:
        assert f"{leaf}=inf" in refusal({LEAVES[leaf]: {leaf: float("inf")}})


def test_one_bad_token_of_several_is_named() -> None:
    assert "train.loss_ignore_tokens.1=-1: Input should be" in refusal({"train": {"loss_ignore_tokens": [3, -1]}})


def test_betas_are_a_pair() -> None:
    assert "betas" in refusal({"optim": {"betas": [0.9]}})
    assert "betas" in refusal({"optim": {"betas": [0.9, 0.95, 0.99]}})
    assert "betas" in refusal({"optim": {"betas": [0.9, 1.0]}})


# (an impossible config, what its error says, a config that fixes it)
IMPOSSIBLE: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "heads and width": (
        {"model": {"d_model": 100, "num_heads": 7}},
        ["d_model=100", "num_heads=7", "head_dim"],
        {"model": {"d_model": 100, "num_heads": 7, "head_dim": 16}},
    ),
    "key/value heads": (
        {"model": {"num_heads": 12, "num_kv_heads": 5}},
        ["num_heads=12", "num_kv_heads=5", "whole number"],
        {"model": {"num_heads": 12, "num_kv_heads": 4}},
    ),
    "rotary of an odd head": (
        {"model": {"d_model": 84, "num_heads": 12, "positions": "rotary"}},
        ["head_dim=7", "rotary", "even"],
        {"model": {"d_model": 84, "num_heads": 12, "positions": "learned"}},
    ),
    "warm-up past the end of cosine": (
        {"optim": {"warmup_steps": 501, "decay_steps": 500}},
        ["warmup_steps=501", "step 500", "cosine", "raise decay_steps"],
        {"optim": {"warmup_steps": 500, "decay_steps": 500}},
    ),
    "warm-up past the end of linear": (
        {"optim": {"warmup_steps": 501, "decay_steps": 500, "decay_method": "linear"}},
        ["warmup_steps=501", "step 500", "linear"],
        {"optim": {"warmup_steps": 501, "decay_steps": 500, "decay_method": "constant"}},
    ),
    "warm-up past the start of the cool-down": (
        {"optim": {"warmup_steps": 401, "decay_steps": 500, "cooldown_steps": 100, "decay_method": "wsd"}},
        ["warmup_steps=401", "step 400", "wsd", "cooldown_steps"],
        {"optim": {"warmup_steps": 400, "decay_steps": 500, "cooldown_steps": 100, "decay_method": "wsd"}},
    ),
    "warm-up past the start of a fractional cool-down": (
        {"optim": {"warmup_steps": 401, "decay_steps": 500, "cooldown_fraction": 0.2, "decay_method": "wsd"}},
        ["warmup_steps=401", "step 400", "wsd", "cooldown_fraction"],
        {"optim": {"warmup_steps": 400, "decay_steps": 500, "cooldown_fraction": 0.2, "decay_method": "wsd"}},
    ),
    "floor above the top": (
        {"optim": {"learning_rate": 1e-5, "min_lr": 2e-5}},
        ["min_lr=2e-05", "learning_rate=1e-05", "lower min_lr"],
        {"optim": {"learning_rate": 1e-5, "min_lr": 1e-5}},
    ),
    "noam without warm-up": (
        {"optim": {"decay_method": "noam", "warmup_steps": 0}},
        ["warmup_steps=0", "noam", "at least 1"],
        {"optim": {"decay_method": "noam", "warmup_steps": 1}},
    ),
    "an end-of-text outside the vocabulary": (
        {"model": {"vocab_size": 100}, "data": {"end_of_text": 100}},
        ["end_of_text=100", "vocab_size=100", "below"],
        {"model": {"vocab_size": 100}, "data": {"end_of_text": 99}},
    ),
    "ignored tokens outside the vocabulary": (
        {"model": {"vocab_size": 100}, "train": {"loss_ignore_tokens": [5, 101]}},
        ["loss_ignore_tokens=101", "vocab_size=100", "below"],
        {"model": {"vocab_size": 100}, "train": {"loss_ignore_tokens": [5, 0]}},
    ),
    "fp16 on XLA": (
        {"train": {"mixed_precision": "fp16"}},
        ["mixed_precision=fp16", "runtime=torch", "bf16"],
        {"train": {"mixed_precision": "fp16"}, "parallel": {"runtime": "torch"}},
    ),
    "dropout in blocks that are computed again": (
        {"model": {"dropout": 0.1}, "train": {"rematerialization": "full"}},
        ["dropout=0.1", "rematerialization=full", "dropout=0"],
        {"model": {"dropout": 0.1}, "train": {"rematerialization": "full"}, "parallel": {"runtime": "torch"}},
    ),
    "dropout in layers of a loop": (
        {"model": {"dropout": 0.1}, "train": {"scan_layers": True}},
        ["dropout=0.1", "scan_layers=True", "dropout=0"],
        {"model": {"dropout": 0.1}},
    ),
    "a run at a URL": (
        {"logging": {"run_dir": "gs://bucket/run"}},
        ["run_dir=gs://bucket/run", "URL", "local --run-dir"],
        {"logging": {"run_dir": "run"}, "checkpoint": {"checkpoints_dir": "gs://bucket/run"}},
    ),
    "checkpoints at a URL and no run_dir": (
        {"checkpoint": {"checkpoints_dir": "gs://bucket/run"}},
        ["checkpoints_dir=gs://bucket/run", "URL", "local --run-dir"],
        {"checkpoint": {"checkpoints_dir": "gs://bucket/run"}, "logging": {"run_dir": "run"}},
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_combination_names_keys_values_and_the_fix(case: str) -> None:
    tree, expected, fixed = IMPOSSIBLE[case]
    line = refusal(tree)
    for part in expected:
        assert part in line
    build_config(fixed, "my.yaml")


def test_given_values_are_set_and_others_keep_their_defaults() -> None:
    config = build_config({"model": {"d_model": 96}, "optim": {"betas": [0.9, 0.95]}}, "my.yaml")
    assert config.model.d_model == 96
    assert config.optim.betas == (0.9, 0.95)
    assert config.data == RunConfig().data
    with pytest.raises(ValidationError, match="frozen"):
        config.model.d_model = 64


def test_derived_sizes() -> None:
    config = build_config(
        {
            "model": {"seq_length": 64, "d_model": 96, "num_heads": 6, "vocab_size": 50257, "vocab_multiple": 128},
            "train": {"train_batch_size": 8, "gradient_accum_step": 4},
        },
        "my.yaml",
    )
    assert config.sequences_per_step == 32
    assert config.tokens_per_step == 2048
    assert (config.model.heads_dim, config.model.kv_heads) == (16, 6)
    assert config.model.padded_vocab_size == 50304
    wide = build_config({"model": {"head_dim": 80, "num_kv_heads": 3, "vocab_size": 256}}, "my.yaml").model
    assert (wide.heads_dim, wide.kv_heads, wide.padded_vocab_size) == (80, 3, 256)


@pytest.mark.parametrize(
    ("run_dir", "checkpoints_dir", "files", "checkpoints"),
    [
        (None, "checkpoints", "checkpoints", "checkpoints"),
        ("runs/a", "checkpoints", "runs/a", "runs/a/checkpoints"),
        ("runs/a", "/elsewhere/c", "runs/a", "/elsewhere/c"),
        ("runs/a", "gs://bucket/c", "runs/a", "gs://bucket/c"),
        ("gs://bucket/a", "checkpoints", "gs://bucket/a", "gs://bucket/a/checkpoints"),
        (None, "gs://bucket/c", "gs://bucket/c", "gs://bucket/c"),
    ],
)
def test_where_the_run_puts_its_files(run_dir: str | None, checkpoints_dir: str, files: str, checkpoints: str) -> None:
    tree = {"logging": {"run_dir": run_dir}, "checkpoint": {"checkpoints_dir": checkpoints_dir}}
    config = build_config(
        tree | {"train": {"do_test": True}}, "my.yaml"
    )  # an evaluation writes nothing, so a URL is allowed
    assert config.run_dir == files
    assert config.checkpoints_dir == checkpoints


def reread(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return build_config(load_yaml(str(path)), str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_are_valid_and_read_back_equal(path: Path, tmp_path: Path) -> None:
    config = build_config(load_yaml(str(path)), path.name)
    assert config != RunConfig()
    assert reread(config, tmp_path) == config


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
floats = st.floats(min_value=1e-30, max_value=1e30)


@settings(max_examples=60, deadline=None)
@given(
    notes=st.none() | words | st.sampled_from(["null", "yes", "1e5", "~", "0x10", "- a", "a: b", "#", "2026-01-01"]),
    tags=st.lists(words, max_size=3),
    epsilon=floats,
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    rate=floats,
    heads=st.none() | st.sampled_from([1, 2, 3, 4, 6, 12]),
    seed=st.integers(min_value=0, max_value=2**64),
)
def test_written_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    notes: str | None,
    tags: list[str],
    epsilon: float,
    betas: tuple[float, float],
    rate: float,
    heads: int | None,
    seed: int,
) -> None:
    tree = {
        "model": {"num_kv_heads": heads},
        "optim": {"adam_eps": epsilon, "betas": betas, "learning_rate": rate, "decay_method": "constant"},
        "train": {"seed": seed},
        "logging": {"wandb_notes": notes, "wandb_tags": tags},
    }
    config = build_config(tree, "x")
    assert config.wandb.wandb_tags == tuple(tags)
    assert reread(config, tmp_path_factory.getbasetemp()) == config


def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ("", "# nothing yet\n", "model:\noptim:\n"):
        path.write_text(text)
        assert build_config(load_yaml(str(path)), "x") == RunConfig()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: {d_model: [", "not valid YAML"),
        (b"- model\n", "expected sections (model, data, optim"),
        (b"d_model: 64\n", "expected sections (model, data, optim"),
        (b"model: [d_model]\n", "expected sections"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"model: \x00", "not valid YAML"),
        (b"model:\n  d_model: 64\n  seq_length: 8\n  d_model: 96\n", "duplicate key 'd_model'"),
        (b"model:\n  d_model: 64\nmodel:\n  seq_length: 8\n", "duplicate key 'model'"),
    ],
)
def test_a_file_that_is_not_a_config(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_yaml(str(path))
    assert str(caught.value).startswith(f"--config {path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; the configs of this package are in configs/"):
        load_yaml(str(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(str(tmp_path))
