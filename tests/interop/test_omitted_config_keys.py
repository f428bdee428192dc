"""A key that a config.json omits has the default of `transformers`, or the file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from pretrain_xla.errors import UserError
from pretrain_xla.interop.config_json import OWN_CONFIG_KEY, read_config
from pretrain_xla.interop.families import FAMILIES
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT

from .conftest import assert_same_logits, build, noise, open_in_transformers, tiny
from .test_export import EXAMPLES, export
from .test_import import MADE, SHAPE, make

ROPE = ("rope_theta", "rope_parameters")
OTHER = ("sliding_window", "layer_types", "partial_rotary_factor", "use_qkv_bias", "use_bias")


def save(family: str, folder: Path) -> dict[str, Any]:
    """A model of the family, with rotary positions where it can have them; its config.json without our own part."""
    if family in EXAMPLES and family != "smollm3":
        export(build(tiny(**EXAMPLES[family])), folder)
    elif family in MADE:
        make(family).save_pretrained(folder)
    else:
        shape = transformers.AutoConfig.for_model(family, **SHAPE, num_key_value_heads=2)
        if family == "smollm3":
            shape.no_rope_layers = [1, 1]
        noise(transformers.AutoModelForCausalLM.from_config(shape), size=0.1).save_pretrained(folder)
    tree: dict[str, Any] = json.loads((folder / "config.json").read_text())
    tree.pop(OWN_CONFIG_KEY, None)
    return tree


def load(folder: Path) -> GPT:
    loaded = load_model(str(folder))
    model = GPT(loaded.config)
    model.load_state_dict(loaded.tensors, strict=True)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_each_omitted_key_has_its_default_or_is_refused(family: Any, tmp_path: Path) -> None:
    tree = save(family.model_type, tmp_path)
    left_out = [(key,) for key in (*family.keys, *family.required, *OTHER) if key in tree]
    agreed = 0
    for keys in [ROPE, *left_out]:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if k not in keys}))
        try:
            ours = load(tmp_path)
        except UserError:
            continue
        try:
            theirs = open_in_transformers(tmp_path)
        except RuntimeError:
            continue  # its tensors do not fit there
        assert_same_logits(ours, theirs)
        agreed += 1
    assert agreed > 2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "vaultgemma", "gemma3_text"])
def test_an_omitted_window_cuts_the_context(family: str) -> None:
    shape = transformers.AutoConfig.for_model(
        family, **SHAPE | {"max_position_embeddings": 8192, "num_key_value_heads": 2}
    ).to_dict()
    rope = {"rope_theta": 1e4, "rope_parameters": None}
    minimal = {key: value for key, value in shape.items() if key not in ("sliding_window", "layer_types")} | rope
    assert read_config(minimal, "test")[1].seq_length == 4096
    full = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    assert read_config(minimal | full, "test")[1].seq_length == 8192


def test_gemma_ones_gelu_is_the_tanh_form(tmp_path: Path) -> None:
    tree = save("gemma", tmp_path)
    export(build(tiny(**EXAMPLES["gemma"] | {"activation": "gelu_exact"})), tmp_path / "exact")
    for folder, change in ((tmp_path, {"hidden_act": "gelu"}), (tmp_path / "exact", {})):
        if change:
            (folder / "config.json").write_text(json.dumps(tree | change))
        assert_same_logits(load(folder), open_in_transformers(folder))
    assert load(tmp_path).config.activation == "gelu"
    assert load(tmp_path / "exact").config.activation == "gelu_exact"


def test_gemma_three_as_released_has_two_bases(tmp_path: Path) -> None:
    tree = save("gemma3_text", tmp_path) | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    released = {key: value for key, value in tree.items() if key not in ("rope_parameters", "layer_types")}
    with pytest.raises(UserError, match=r"rope_theta differs between layers \(\[10000.0, 1000000.0\]\)"):
        read_config(released | {"sliding_window_pattern": 2}, "test")
    for pattern, theta in ((6, 1e4), (1, 1e6)):
        (tmp_path / "config.json").write_text(json.dumps(released | {"sliding_window_pattern": pattern}))
        ours = load(tmp_path)
        assert ours.config.rope_theta == theta
        assert_same_logits(ours, open_in_transformers(tmp_path))


def test_gemma_three_with_a_cap_on_attention_scores_is_refused(tmp_path: Path) -> None:
    """transformers ignores that key, so nobody can tell whether the weights were trained with the cap."""
    tree = save("gemma3_text", tmp_path) | {"attn_logit_softcapping": 0.7}
    with pytest.raises(
        UserError, match=r"attn_logit_softcapping=0.7, and our model computes gemma3_text only with None"
    ):
        read_config(tree, "test")
