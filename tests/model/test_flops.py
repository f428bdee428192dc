import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, flops_per_token, forward_flops_per_token, parameter_count

GPT2_SIZES = [
    (768, 12, 12, 124_439_808),
    (1024, 24, 16, 354_823_168),
    (1280, 36, 20, 774_030_080),
    (1600, 48, 25, 1_557_611_200),
]


@pytest.mark.parametrize(("d_model", "num_layers", "num_heads", "expected"), GPT2_SIZES)
def test_gpt2_sizes(d_model, num_layers, num_heads, expected):
    sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "d_ff": 4 * d_model}
    assert parameter_count(ModelConfig(**sizes, seq_length=1024, tie_weights=True)) == expected


def test_palm_formula():
    """GPT-2 124M at T = 1024 by hand: N = 12 * 12 * 768² + 50257 * 768, attention 12 * 12 * 768 * 1024."""
    config = ModelConfig(seq_length=1024, tie_weights=True)
    assert flops_per_token(config) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": True, "activation": "silu", "tie_weights": True},
        {"num_kv_heads": 1, "head_dim": 10, "positions": "rotary", "bias": False},
        {"num_kv_heads": 2, "qk_norm": True, "post_norm": True, "norm": "rmsnorm"},
    ],
    ids=str,
)
def test_flops_are_those_that_run(tiny, build, batch, changes):
    config = tiny(**changes, vocab_multiple=1, attention="reference")
    model = build(config).train()
    tokens_BT, targets_BT = batch(config)
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens_BT, targets_BT)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == forward_flops_per_token(config) * tokens_BT.numel()
    assert forward.get_total_flops() + backward.get_total_flops() == flops_per_token(config) * tokens_BT.numel()


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True, "norm": "rmsnorm", "gated": True, "bias": False}])
def test_parameter_count_leaves_padding_out(tiny, changes):
    with torch.device("meta"):
        model = GPT(tiny(**changes, vocab_multiple=1))
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(tiny(**changes, vocab_multiple=1)) == actual
    assert parameter_count(tiny(**changes, vocab_multiple=64)) == actual
