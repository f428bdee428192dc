"""Each module of the TPU's version gives what the module that it replaces gives, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, Execution
from pretrain_xla.model.attention import Attention
from pretrain_xla.model.gpt import Block, Blocks
from pretrain_xla.model.layers import FeedForward, LayerNorm, Linear, RMSNorm
from pretrain_xla.model.rewriting import rewritten
from pretrain_xla.model.xla import XlaContext, XlaGPT, optimize_for_xla
from pretrain_xla.model.xla.attention import XlaAttention, XlaFeedForward
from pretrain_xla.model.xla.block import XlaBlock
from pretrain_xla.model.xla.layer_scan import RecomputedBlocks, ScannedBlocks
from pretrain_xla.model.xla.linear import ProductBiasLinear, add_bias
from pretrain_xla.model.xla.norms import CopyLayerNorm, FactoredRMSNorm
from pretrain_xla.model.xla.saved import Record, Replay

GPT2: dict[str, Any] = {}
MODERN: dict[str, Any] = {
    "norm": "rmsnorm_zero_centered", "positions": "rotary", "gated": True, "activation": "silu", "qk_norm": True,
    "num_kv_heads": 2, "post_norm": True, "attention_softcap": 5.0,
}  # fmt: skip
OPTIONS = pytest.mark.parametrize("options", [GPT2, MODERN], ids=["gpt2", "modern"])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).float()


def filled(module: nn.Module) -> Any:
    for number, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return module


def assert_same(
    one: nn.Module, other: nn.Module, x_BTD: Tensor, *arguments: Any, names: Any = lambda name: name
) -> None:
    """The same output, and the same gradients of the input and of every parameter."""
    results = []
    for module in (one, other):
        leaf_BTD = x_BTD.clone().requires_grad_()
        output = module(leaf_BTD, *arguments)
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(torch.tanh(output).sum(), [leaf_BTD, *parameters.values()])
        results.append(
            {"output": output.detach(), "x": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}
        )
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(
            value, results[1][name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def rotary(config: ModelConfig) -> Any:
    return GPT(config)._rotary(config.seq_length, None)


@OPTIONS
@pytest.mark.parametrize("version", [XlaBlock, XlaAttention, XlaFeedForward])
def test_modules_of_a_block(
    tiny: Callable[..., ModelConfig], options: dict[str, Any], version: type[nn.Module]
) -> None:
    config = tiny(**options)
    block = filled(Block(config, torch.float32))
    fast = optimize_for_xla(GPT(config), Execution(), XlaContext()).blocks[0]  # type: ignore[index]
    fast.load_state_dict(block.state_dict())
    pairs = {
        XlaBlock: (block, fast, (rotary(config), None)),
        XlaAttention: (block.attention, fast.attention, (rotary(config), None)),
        XlaFeedForward: (block.feed_forward, fast.feed_forward, ()),
    }
    plain, fast, arguments = pairs[version]
    assert type(fast) is version
    assert_same(plain, fast, noise(2, 12, 24), *arguments)
    if arguments:
        segments_BT = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
        assert_same(plain, fast, noise(2, 12, 24), arguments[0], segments_BT)


@OPTIONS
def test_what_replaces_what(tiny: Callable[..., ModelConfig], options: dict[str, Any]) -> None:
    """All that `rewrite.py` lists, and nothing else; the parameters are the same objects, under the same names."""
    model = GPT(tiny(**options))
    named = dict(model.named_parameters())
    fast = optimize_for_xla(model, Execution("selective"), XlaContext())
    assert all(parameter is named[name] for name, parameter in fast.named_parameters())
    assert len(list(fast.named_parameters())) == len(named)
    replaced = {
        GPT: XlaGPT, Blocks: RecomputedBlocks, Block: XlaBlock, Attention: XlaAttention, FeedForward: XlaFeedForward,
    }  # fmt: skip
    modules = dict(fast.named_modules())
    for name, module in model.named_modules():
        if name.endswith((".query", ".key", ".value")):
            assert type(modules[name]) is ProductBiasLinear
        elif name.endswith("attention_norm"):
            assert type(modules[name]) is (FactoredRMSNorm if options else CopyLayerNorm)
        else:
            assert type(modules[name]) is replaced.get(type(module), type(module)), name
    assert type(optimize_for_xla(model, Execution(scan_layers=True), XlaContext()).blocks) is ScannedBlocks


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_factored_rms_norm(zero_centered: bool, bias: bool) -> None:
    plain = filled(RMSNorm(6, 1e-2, zero_centered, torch.float32))
    norm = rewritten(plain, FactoredRMSNorm)
    linears = [filled(Linear(6, 5, bias)), filled(Linear(6, 3, bias))]
    products = [rewritten(linear, ProductBiasLinear) for linear in linears]
    x_BTD = (3 * noise(2, 4, 6)).requires_grad_()
    at_once = [linear(plain(x_BTD)) for linear in linears]
    values_BTD, factors_BT1 = norm.factors(x_BTD)
    late = [product(values_BTD, factors_BT1) for product in products]
    leaves = [x_BTD, norm.weight, *(p for linear in linears for p in linear.parameters())]
    assert not factors_BT1.requires_grad
    for one, other in zip(late, at_once, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [
        torch.autograd.grad(sum(torch.tanh(output).sum() for output in outputs), leaves) for outputs in (late, at_once)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_factors_of_a_copy() -> None:
    norm = filled(FactoredRMSNorm(6, 1e-2, False, torch.float32))
    weight = noise(5, 6)

    def gradient(x: Tensor, source: Tensor | None) -> Tensor:
        values, factors = norm.factors(x, source)
        return torch.autograd.grad(torch.tanh(values @ weight.T * factors).sum(), x)[0]

    x_BD = noise(4, 6)
    assert torch.equal(gradient(x_BD.clone().requires_grad_(), x_BD), gradient(x_BD.clone().requires_grad_(), None))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_of_a_copy(bias: bool) -> None:
    plain = filled(LayerNorm(6, 1e-2, bias, torch.float32))
    norm = rewritten(plain, CopyLayerNorm)
    source, weights = 3 * noise(2, 4, 6) + 2.0, noise(6)
    results = []
    for factors in (lambda x: plain(x), lambda x: norm.factors(x)[0], lambda x: norm.factors(x, source)[0]):
        x = source.clone().requires_grad_()
        output = factors(x)
        results.append([output, *torch.autograd.grad((torch.tanh(output) * weights).sum(), [x, *norm.parameters()])])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other)


def test_factors_in_the_compute_type() -> None:
    norm = FactoredRMSNorm(64, 1e-5, False, torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    x = 1e4 * noise(3, 64).bfloat16()
    values, factors = norm.factors(x)
    assert values.dtype == torch.bfloat16
    assert factors.dtype == torch.float32
    torch.testing.assert_close((values * factors).square().mean(-1), torch.ones(3), rtol=1e-2, atol=0)


def test_bias_by_product() -> None:
    x_BTF, bias_F, grad_BTF = (torch.randn(*shape).bfloat16() for shape in ((2, 50, 6), (6,), (2, 50, 6)))
    leaves = [x_BTF.requires_grad_(), bias_F.requires_grad_()]
    output = add_bias(x_BTF, bias_F)
    assert torch.equal(output, x_BTF + bias_F)
    grad_x, grad_bias = torch.autograd.grad(output, leaves, grad_BTF)
    assert torch.equal(grad_x, grad_BTF)
    torch.testing.assert_close(grad_bias, grad_BTF.float().sum((0, 1)).bfloat16())


def test_linear_with_a_bias_by_product() -> None:
    plain = filled(Linear(24, 16, True))
    product, x_BTF = rewritten(plain, ProductBiasLinear), noise(2, 40, 24).bfloat16()
    outputs = [linear(x_BTF) for linear in (plain, product)]
    assert "AddBias" in str(outputs[1].grad_fn)
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad(output, list(plain.parameters()), outputs[0].detach()) for output in outputs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-1)


def test_saved_values_are_not_computed_again() -> None:
    calls = []

    def block(x: Tensor, save: Any) -> Tensor:
        (squares,) = save.outputs(lambda: [calls.append(1) or x.detach().square()], 1)
        return save(torch.sin(x)) + squares

    x, record = noise(5), Record()
    first = block(x, record)
    again, leaf = Replay([value + 1.0 for value in record.values]), x.clone().requires_grad_()
    second = block(leaf, again)
    assert len(calls) == 1
    torch.testing.assert_close(second, first + 2.0)  # from the recorded values, which were changed
    torch.testing.assert_close(
        torch.autograd.grad(second.sum(), leaf)[0], torch.cos(x)
    )  # and the gradient of the computed
