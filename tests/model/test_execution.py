"""How a model is run changes no number: chunked loss, rematerialised and looped blocks against the plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, Execution, cross_entropy, initialize
from pretrain_xla.model.torch_rewrite import optimize_for_torch
from pretrain_xla.model.xla import XlaContext, optimize_for_xla
from pretrain_xla.model.xla.linear_loss import Head, _cut, linear_cross_entropy
from pretrain_xla.model.xla.stacked import unstack_layers

SIZES: dict[str, Any] = {
    "vocab_size": 61, "vocab_multiple": 16, "seq_length": 12, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_weights": True},
    "modern": {"norm": "rmsnorm", "positions": "rotary", "gated": True, "activation": "silu", "qk_norm": True, "bias": False},
    "biases": {"norm": "rmsnorm", "gated": True},
    "gemma": {
        "norm": "rmsnorm_zero_centered", "positions": "rotary", "gated": True, "bias": False, "num_kv_heads": 2,
        "post_norm": True, "attention": "reference", "attention_softcap": 5.0, "logit_softcap": 3.0,
    },
}  # fmt: skip


def loss_and_gradients(model: GPT, ignored: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 61, (2, 12), generator=generator, dtype=torch.int32)
    targets_BT = tokens_BT.roll(-1, 1).clone()
    if ignored:
        targets_BT[0, 3:7] = -100
    loss = model(tokens_BT, targets_BT)
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    return unstack_layers(gradients) | {"loss": loss.detach()}


Way = Callable[[GPT], GPT]


def make(options: dict[str, Any], way: Way = lambda model: model) -> GPT:
    model = GPT(ModelConfig(**SIZES, **options))
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return way(model)


def on_xla(*options: Any) -> Way:
    return lambda model: optimize_for_xla(model, Execution(*options), XlaContext())


def on_torch(*options: Any) -> Way:
    return lambda model: optimize_for_torch(model, Execution(*options))


WAYS = {
    "xla": on_xla(),
    "xla, selective": on_xla("selective"),
    "xla, full": on_xla("full"),
    "xla, scan": on_xla("none", True),
    "xla, selective scan": on_xla("selective", True),
    "xla, full scan, chunked loss": on_xla("full", True, 8),
    "torch, chunked loss": on_torch("none", False, 5),
    "torch, selective": on_torch("selective"),
    "torch, full, chunked loss": on_torch("full", False, 5),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_same_loss_and_gradients(kind: str, way: str) -> None:
    expected = loss_and_gradients(make(MODELS[kind]), ignored=True)
    found = loss_and_gradients(make(MODELS[kind], WAYS[way]), ignored=True)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_computed_again() -> None:
    """Selective repeats no matrix product; full repeats those of the blocks, but for the last, which nothing waits for."""

    def operations(*options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(make(MODELS["gpt2"], on_torch(*options)))
        return counter.get_total_flops()

    products = 2 * 24 * 3 * (4 * 24 * 24 + 24 * 40)
    assert operations("selective") == operations()
    assert operations("full") - operations() == products


def test_without_gradients_nothing_is_kept() -> None:
    model = make(MODELS["gpt2"], on_xla("selective", True))
    tokens_BT = torch.zeros(1, 12, dtype=torch.int32)
    with torch.no_grad():
        loss = model(tokens_BT, tokens_BT)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("tokens", "chunk", "expected"),
    [
        (8192, None, (1, 8192)),
        (8192, 8192, (1, 8192)),
        (8192, 2048, (4, 2048)),
        (8192, 3000, (4, 2048)),  # full ones of a round length rather than three of 2,731
        (8191, 2048, (4, 2048)),  # a prime number: one token is filled in
        (7 * 1021, 2048, (7, 1021)),
        (22, 7, (4, 6)),
        (5, 1, (5, 1)),
    ],
)
def test_chunks_are_few_and_full(tokens: int, chunk: int | None, expected: tuple[int, int]) -> None:
    assert _cut(tokens, chunk) == expected


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [None, 1, 7, 24])
def test_linear_cross_entropy(softcap: float | None, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight_VD = torch.randn(32, 8, generator=generator).requires_grad_()
    targets_BT = torch.randint(0, 30, (2, 12), generator=generator, dtype=torch.int32)
    targets_BT[1, :5] = -100
    logits_BTV = (x_BTD @ weight_VD.T)[..., :30]
    if softcap is not None:
        logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
    expected = 3.0 * cross_entropy(logits_BTV, targets_BT)
    found = 3.0 * linear_cross_entropy(x_BTD, weight_VD, targets_BT, Head(30, softcap, chunk))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, [x_BTD, weight_VD]), torch.autograd.grad(expected, [x_BTD, weight_VD]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
