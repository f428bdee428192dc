"""The sharding table covers every model that a config can describe, and impossible meshes are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.config import ModelConfig, build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.model import GPT
from pretrain_xla.runtime.sharding import ACTIVATIONS, BATCH, check_model_fits, lookup, parameter_axes, resolve_mesh

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
AXES = {"data", "fsdp", "tensor"}


def on_meta(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def assert_covered(model: GPT) -> None:
    """Each parameter has one entry per dimension and no axis twice; matrices are sharded over fsdp and tensor."""
    for name, parameter in model.named_parameters():
        axes = parameter_axes(name)
        assert len(axes) == parameter.dim(), name
        used = [axis for axis in axes if axis is not None]
        assert set(used) <= AXES - {"data"}, f"{name}: parameters are not sharded over data"
        assert len(used) == len(set(used)), name
        if parameter.dim() == 2:
            assert "fsdp" in used, f"{name} would be replicated on every device"
            assert ("tensor" in used) == (name != "position_embedding.weight"), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_parameter_of_every_config_has_its_row(path: Path) -> None:
    assert_covered(on_meta(build_config(load_yaml(str(path)), path.name).model))


TINY: dict[str, Any] = {"vocab_size": 61, "seq_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 4, "d_ff": 24}
CHOICES: dict[str, list[Any]] = {
    "norm": ["layernorm", "rmsnorm", "rmsnorm_zero_centered"],
    "bias": [True, False],
    "gated": [True, False],
    "post_norm": [True, False],
    "qk_norm": [True, False],
    "positions": ["learned", "rotary", "none"],
    "tie_weights": [True, False],
    "num_kv_heads": [None, 2],
}


def test_every_parameter_of_every_kind_of_model_has_its_row() -> None:
    for values in itertools.product(*CHOICES.values()):
        assert_covered(on_meta(ModelConfig(**TINY, **dict(zip(CHOICES, values, strict=True)))))


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_model_that_fits_is_sharded_evenly(tensor: int) -> None:
    config = ModelConfig(**TINY, gated=True, num_kv_heads=4)
    check_model_fits(config, tensor)
    for name, parameter in on_meta(config).named_parameters():
        for size, axis in zip(parameter.shape, parameter_axes(name), strict=True):
            assert axis != "tensor" or size % tensor == 0, name


def test_pairs_of_matrices_are_sharded_as_in_megatron() -> None:
    for first in ("attention.query", "attention.key", "attention.value", "feed_forward.up", "feed_forward.gate"):
        assert parameter_axes(f"blocks.3.{first}.weight") == ("tensor", "fsdp")
        assert parameter_axes(f"blocks.3.{first}.bias") == ("tensor",)
    for second in ("attention.output", "feed_forward.down"):
        assert parameter_axes(f"blocks.3.{second}.weight") == ("fsdp", "tensor")
        assert parameter_axes(f"blocks.3.{second}.bias") == (None,)
    for norm in ("blocks.11.attention.query_norm", "blocks.0.attention_norm", "final_norm"):
        assert parameter_axes(f"{norm}.weight") == (None,)


@pytest.mark.parametrize("name", ["blocks.0.mixer.query.weight", "router.weight", "embedding.bias", "blocks.0.scale"])
def test_a_new_kind_of_parameter_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        parameter_axes(name)


def test_sharding_is_constrained_after_the_embedding_and_each_block() -> None:
    model = on_meta(ModelConfig(**TINY, qk_norm=True))
    constrained = {name for name, _ in model.named_modules() if lookup(ACTIVATIONS, name) is not None}
    assert constrained == {"embedding", "blocks.0", "blocks.1"}
    assert lookup(ACTIVATIONS, "blocks.10") == (BATCH, None, None)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 4, 1), 8, (2, 4, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((1, 8, 1), 8, (1, 8, 1)),
    ],
)
def test_the_data_axis_takes_what_is_left(
    sizes: tuple[int, int, int], devices: int, expected: tuple[int, int, int]
) -> None:
    assert resolve_mesh(sizes, devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [((2, 1, 1), 1), ((-1, 3, 1), 8), ((-1, 16, 1), 8), ((4, 4, 1), 8), ((0, 1, 1), 1), ((-1, 1, 5), 4)],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, int, int], devices: int) -> None:
    with pytest.raises(UserError) as caught:
        resolve_mesh(sizes, devices)
    line = str(caught.value)
    data, fsdp, tensor = sizes
    assert f"data={data} x fsdp={fsdp} x tensor={tensor}" in line
    assert f"{devices} device(s)" in line
    assert "--mesh-fsdp" in line
    assert "\n" not in line


@given(data=st.integers(-1, 9), fsdp=st.integers(1, 9), tensor=st.integers(1, 9), devices=st.integers(1, 81))
def test_a_mesh_uses_every_device_or_is_refused(data: int, fsdp: int, tensor: int, devices: int) -> None:
    try:
        mesh = resolve_mesh((data, fsdp, tensor), devices)
    except UserError:
        assert devices % (fsdp * tensor) if data == -1 else data * fsdp * tensor != devices
    else:
        assert mesh[0] * mesh[1] * mesh[2] == devices
        assert mesh[1:] == (fsdp, tensor)
        assert data in (-1, mesh[0])


@pytest.mark.parametrize(
    ("changes", "tensor", "expected"),
    [
        ({"d_model": 36, "num_heads": 6}, 4, "num_heads=6"),
        ({"d_model": 32, "num_heads": 8, "num_kv_heads": 2}, 4, "num_kv_heads=2"),
        ({"d_model": 32, "num_heads": 8, "d_ff": 30}, 4, "d_ff=30"),
    ],
)
def test_a_tensor_axis_that_would_split_a_head_is_refused(changes: dict[str, int], tensor: int, expected: str) -> None:
    config = ModelConfig(**(TINY | changes))
    check_model_fits(config, 1)
    with pytest.raises(UserError, match=f"mesh_tensor={tensor} does not divide {expected}"):
        check_model_fits(config, tensor)
