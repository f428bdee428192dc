import math

import pytest
import torch

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, initialize

WIDE = {"vocab_size": 1000, "vocab_multiple": 128, "seq_length": 64, "d_model": 128, "num_layers": 3, "num_heads": 4}
RESIDUAL = ("attention.output.weight", "feed_forward.down.weight")


def initialized(seed=0, **changes):
    model = GPT(ModelConfig(**(WIDE | {"d_ff": 320} | changes)))
    initialize(model, seed)
    return model


def expected_std(name, init):
    if init == "mup" and name in ("embedding.weight", "position_embedding.weight", "head.weight"):
        return 0.0 if name == "head.weight" else 1.0
    if init in ("fan_in", "mup"):
        if name.endswith(RESIDUAL):
            return 0.0
        return 1 / math.sqrt(128)
    return 0.02 / math.sqrt(6) if init == "gpt2" and name.endswith(RESIDUAL) else 0.02


@pytest.mark.parametrize("init", ["gpt2", "normal", "fan_in", "mup"])
def test_statistics_of_matrices(init):
    model = initialized(init=init)
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert len(matrices) == 3 + 3 * 6
    for name, parameter in matrices.items():
        real = parameter[:1000] if name in ("embedding.weight", "head.weight") else parameter
        assert real.std().item() == pytest.approx(expected_std(name, init), rel=0.05), name
        assert abs(real.mean().item()) < 0.02 * max(expected_std(name, init), 0.1), name
    if init in ("fan_in", "mup"):
        assert not any(matrices[name].any() for name in matrices if name.endswith(RESIDUAL))


@pytest.mark.parametrize(("norm", "expected"), [("layernorm", 1.0), ("rmsnorm", 1.0), ("rmsnorm_zero_centered", 0.0)])
def test_norms_and_biases_are_the_identity(norm, expected):
    model = initialized(norm=norm, qk_norm=True, post_norm=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == expected).all(), name


def test_padding_rows_are_zero_and_real_rows_do_not_depend_on_them():
    padded, plain = initialized(), initialized(vocab_multiple=1)
    for name in ("embedding.weight", "head.weight"):
        assert padded.get_parameter(name).shape == (1024, 128)
        assert not padded.get_parameter(name)[1000:].any()
        assert torch.equal(padded.get_parameter(name)[:1000], plain.get_parameter(name))


def test_seed_decides_and_no_two_parameters_are_alike():
    first, again, other = (initialized(seed).state_dict() for seed in (1, 1, 2))
    matrices = [name for name, value in first.items() if value.ndim == 2]
    for name in first:
        assert torch.equal(first[name], again[name]), name
    for name in matrices:
        assert not torch.equal(first[name], other[name]), name
    corners = {tuple(first[name][0, :3].tolist()) for name in matrices}
    assert len(corners) == len(matrices)


def test_a_parameter_does_not_depend_on_what_else_the_model_has():
    """Another block, other kinds of layers: the weights of the same name stay."""
    small, large = (
        initialized(init="normal").state_dict(),
        initialized(init="normal", num_layers=4, qk_norm=True, gated=True),
    )
    for name, value in small.items():
        assert torch.equal(value, large.state_dict()[name]), name


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    initialized()
    assert torch.equal(torch.rand(3), expected)


def test_first_loss_is_that_of_a_uniform_guess():
    model = initialized()
    tokens_BT = torch.randint(0, 1000, (4, 65), generator=torch.Generator().manual_seed(0))
    assert model(tokens_BT[:, :-1], tokens_BT[:, 1:]).item() == pytest.approx(math.log(1000), abs=0.1)
