"""Blocks whose parameters are held together: the same model, the same names on disk, the same decay."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig, OptimConfig, RunConfig
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.model.attention import Heads
from pretrain_xla.model.xla import XlaContext, optimize_for_xla
from pretrain_xla.model.xla.stacked import StackedBlocks, is_stacked, unstack_layers, unstacked_shapes
from pretrain_xla.optim.adamw import AdamW
from pretrain_xla.optim.matrices import map_stacks
from pretrain_xla.optim.parameters import zeros
from pretrain_xla.run_folder.build import build_optimizer
from pretrain_xla.run_folder.state_source import read_regions, shape_of
from pretrain_xla.runtime.sharding import parameter_axes
from pretrain_xla.runtime.shards import whole_region

CONFIG = ModelConfig(
    vocab_size=61,
    vocab_multiple=16,
    seq_length=12,
    d_model=24,
    num_layers=3,
    num_heads=4,
    d_ff=40,
    norm="rmsnorm",
    gated=True,
)
TOKENS_BT = torch.arange(24, dtype=torch.int32).view(2, 12)


def make(*, stacked: bool) -> GPT:
    model = GPT(CONFIG)
    initialize(model, seed=3)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return optimize_for_xla(model, Execution("full", scan_layers=stacked), XlaContext())


def gradients(model: GPT) -> dict[str, Tensor]:
    loss = model(TOKENS_BT, TOKENS_BT.roll(-1, 1))
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_stacked_is_the_same_model() -> None:
    plain, stacked = make(stacked=False), make(stacked=True)
    assert isinstance(stacked.blocks, StackedBlocks)
    assert len(list(stacked.named_parameters())) < len(list(plain.named_parameters()))
    assert len(stacked.blocks) == len(list(plain.blocks.children()))
    found, expected = unstack_layers(gradients(stacked)), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_each_block_can_be_called_by_itself() -> None:
    """As generation does, with its cache in place of attention over these tokens."""

    class Cache:
        def attend(self, heads: Heads) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)

    plain, stacked = (make(stacked=one).hidden(TOKENS_BT, segments=Cache()) for one in (False, True))
    torch.testing.assert_close(stacked, plain)
    torch.testing.assert_close(plain, make(stacked=True).hidden(TOKENS_BT))


def test_names_on_disk_are_those_of_the_layers() -> None:
    state = {name: parameter.detach() for name, parameter in make(stacked=False).named_parameters()}
    stacked = {name: parameter.detach() for name, parameter in make(stacked=True).named_parameters()}
    apart = unstack_layers(stacked)
    assert apart.keys() == state.keys()
    assert all(torch.equal(apart[name], tensor) for name, tensor in state.items())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in apart.values() if tensor.dim() == 1)
    for name, tensor in stacked.items():
        assert shape_of(apart, name) == tuple(tensor.shape)
        (together,) = read_regions(apart, name, [whole_region(tensor.shape)])
        assert torch.equal(together, tensor)
        if is_stacked(name):  # of the last two rows, what one of several hosts holds
            region = ((1, *(0,) * (tensor.dim() - 1)), (tensor.shape[0] - 1, 1, *tensor.shape[2:]))
            assert torch.equal(read_regions(apart, name, [region])[0], tensor[1:, :1])
    assert shape_of(apart, "blocks.all.nothing") is None
    shapes = {name: tuple(tensor.shape) for name, tensor in stacked.items()}
    assert unstacked_shapes(shapes) == {name: tuple(tensor.shape) for name, tensor in apart.items()}


def test_optimizer_and_mesh_take_a_layer_for_what_it_is() -> None:
    model = make(stacked=True)
    optimizer = build_optimizer(RunConfig(model=CONFIG, optim=OptimConfig(weight_decay=0.1)), model, zeros, map_stacks)
    (rule,) = optimizer.rules
    assert isinstance(rule, AdamW)
    decayed = set(rule.names[: rule.decays[0][1]])
    assert [decay for decay, _ in rule.decays] == [0.1, 0.0]
    assert "blocks.all.attention.query.weight" in decayed
    assert not decayed & {"blocks.all.attention_norm.weight", "blocks.all.attention.query.bias"}
    assert is_stacked("first_moment.blocks.all.feed_forward.up.weight")
    assert parameter_axes("blocks.all.feed_forward.up.weight") == (
        None,
        *parameter_axes("blocks.0.feed_forward.up.weight"),
    )
