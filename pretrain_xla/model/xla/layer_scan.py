"""The blocks of the TPU's version: as one compiled loop, or one by one with little saved for the backward pass.

Plain autograd keeps every intermediate value of every block. A block under rematerialisation keeps its input and what it
saves (`saved.py`), and runs again in backward. With a `Scan` that compiles, the program holds one block instead of a copy for
each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pretrain_xla.model.attention import Segments
from pretrain_xla.model.gpt import Blocks
from pretrain_xla.model.layers import RotaryTables
from pretrain_xla.model.xla.block import XlaBlock
from pretrain_xla.model.xla.context import Barrier, Scan, XlaContext, python_scan
from pretrain_xla.model.xla.saved import SAVE_NOTHING, Record, Replay, Save
from pretrain_xla.model.xla.stacked import StackedBlocks


class ScannedBlocks(StackedBlocks):
    """All blocks in one scan. Each is rematerialised: what an iteration saved would be copied, which costs more.

    keeps: save the products and the attention of each block, or nothing but its input.
    """

    def __init__(self, blocks: Iterable[XlaBlock], *, keeps: bool, context: XlaContext) -> None:
        super().__init__(blocks)
        self._keeps, self._context = keeps, context

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """See `Blocks.forward`. With a key/value cache, which takes the layers one by one, they are not in a scan."""
        if not (segments is None or isinstance(segments, Tensor)):
            for block in self:
                x_BTD = block(x_BTD, rotary, segments)
            return x_BTD
        layers = _Layers(cast(XlaBlock, self.all), rotary, self._keeps, self._context.scan, self._context.barrier)
        return layers.run(x_BTD, segments, list(self.all.parameters()))


class RecomputedBlocks(Blocks):
    """The blocks one after the other, each rematerialised. keeps: see `ScannedBlocks`."""

    def __init__(self, blocks: Iterable[XlaBlock], *, keeps: bool, context: XlaContext) -> None:
        super().__init__(blocks)
        self._keeps, self._context = keeps, context

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """See `Blocks.forward`."""
        block: Any
        for block in self:
            if torch.is_grad_enabled() and (segments is None or isinstance(segments, Tensor)):
                layer = _Layers(block, rotary, self._keeps, python_scan, self._context.barrier)
                x_BTD = layer.run(x_BTD, segments, [parameter[None] for parameter in block.parameters()])
            else:
                x_BTD = block(x_BTD, rotary, segments)
        return x_BTD


LARGE = 3 * 2**20
"""Numbers of a matrix that take, in fp32, most of the 16 MiB which the TPU compiler gives one operation on the chip."""


class _Layers:
    """A scan over blocks, without its tensors. keeps: keep what the blocks save, or nothing but their inputs."""

    def __init__(self, block: XlaBlock, rotary: RotaryTables | None, keeps: bool, scan: Scan, barrier: Barrier) -> None:
        self.block, self.rotary, self.keeps, self.scan, self.barrier = block, rotary, keeps, scan, barrier
        self.compiled = scan is not python_scan
        self.names = [name for name, _ in block.named_parameters()]
        self.dtype: torch.dtype = block.compute_dtype
        self.backward = torch.is_grad_enabled()

    def run(self, x_BTD: Tensor, segments_BT: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
        """All blocks on x_BTD. parameters: in the block's order, each of all blocks, the last block first."""
        result: Tensor = _LayerScan.apply(self, x_BTD, segments_BT, *parameters)
        return result

    def call(
        self,
        x_BTD: Tensor,
        parameters: Sequence[Tensor],
        segments: Sequence[Tensor],
        save: Save,
        source_BTD: Tensor | None = None,
    ) -> Tensor:
        """The block with the given parameters in place of its own. segments: the one tensor, or nothing."""
        by_name = dict(zip(self.names, parameters, strict=True))
        arguments = (x_BTD, self.rotary, segments[0] if segments else None, save, source_BTD)
        output: Tensor = torch.func.functional_call(self.block, by_name, arguments)
        return output

    def cast(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """One block's parameters, detached. Matrices in the compute type, so that their gradients are in it, too."""
        return [p.detach().to(self.dtype) if p.dim() > 1 else p.detach() for p in parameters]

    def cast_for_first_run(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """`cast`. In a compiled scan, the product that reads a weight casts it on the way, at no cost unless it is large.

        With a large weight, some products take more than twice as long. So it is cast before, behind a barrier (docs/LOG.md).
        """
        weights = self.cast(parameters)
        large = [index for index, weight in enumerate(weights) if weight.dim() > 1 and weight.numel() >= LARGE]
        if self.compiled and large:
            for index, weight in zip(large, self.barrier([weights[index] for index in large]), strict=True):
                weights[index] = weight
        return weights

    def hold_input(self, x_BTD: Tensor) -> Tensor:
        """In a compiled scan: keeps the compiler from moving a part of the first norm into the iteration before, as a pass."""
        return self.barrier([x_BTD])[0] if self.compiled else x_BTD

    def copied(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """In a compiled scan, a copy of an iteration's input, and the input; else the input and None.

        The input is in HBM, and a block's backward pass reads it four times. The first pass writes the copy on its way, which
        stays on the chip where there is room (docs/LOG.md has the gain). It does so only if the copy is more than a slice,
        hence the factor: a one of which the compiler does not know that it is one.
        """
        if not self.compiled:
            return x_BTD, None
        one = self.barrier([torch.ones((), device=x_BTD.device)])[0]
        return self.barrier([x_BTD * one])[0], x_BTD

    def held(
        self, grad_BTD: Tensor, parameters: list[Tensor], kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What a second run starts from, behind optimization barriers, so that it is not merged with the first.

        In a compiled scan it cannot be merged. There only the weights pass a barrier, so that they are cast once an iteration
        and not in every product that reads them; some of these, in the backward pass, would take twice as long. Each weight
        has its own, so that a cast can wait for its product. The gradient passes them, too: it is laid out better for it.
        """
        if self.compiled:
            held = []
            for parameter in parameters:
                if parameter.dim() > 1:
                    grad_BTD, parameter = self.barrier([grad_BTD, parameter])
                held.append(parameter)
            return grad_BTD, held, kept
        grad_BTD, *rest = self.barrier([grad_BTD, *parameters, *kept])
        return grad_BTD, rest[: len(parameters)], rest[len(parameters) :]


class _LayerScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: _Layers, x_BTD: Tensor, segments_BT: Tensor | None, *stacked: Tensor) -> Tensor:
        # Carried through the scan, though they never change: found by the body, they would be computed anew in each iteration.
        segments = [] if segments_BT is None else [segments_BT]

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            x_BTD, *segments = carried
            save = Record()
            y_BTD = layers.call(layers.hold_input(x_BTD), layers.cast_for_first_run(slices), segments, save)
            return [y_BTD, *segments], [y_BTD, *(save.values if layers.keeps else [])] if layers.backward else []

        (y_BTD, *_), results = layers.scan(body, [x_BTD, *segments], backwards=stacked)
        ctx.layers = layers
        if layers.backward:
            outputs, *kept = results
            # Where the last block's output is, which nobody needs, comes the first block's input; so the inputs of the others
            # are written by the products that make them, and not by passes of their own that would copy them.
            inputs = torch.select_scatter(outputs, x_BTD, 0, len(outputs) - 1)
            ctx.save_for_backward(*segments, *stacked, *kept, inputs)
            ctx.counts = len(segments), len(segments) + len(stacked)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        layers: _Layers = ctx.layers
        first, second = ctx.counts
        *saved, inputs = ctx.saved_tensors
        segments, stacked, kept = saved[:first], saved[first:second], saved[second:]
        count = len(stacked)

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            grad_BTD, *segments = carried
            grad_BTD, parameters, kept = layers.held(grad_BTD, layers.cast(slices[:count]), slices[count:])
            *values, x_BTD = (tensor.detach() for tensor in kept)
            x_BTD, source_BTD = layers.copied(x_BTD)
            leaves = [x_BTD.requires_grad_(), *(parameter.detach().requires_grad_() for parameter in parameters)]
            with torch.enable_grad():
                y_BTD = layers.call(
                    x_BTD, leaves[1:], segments, Replay(values) if layers.keeps else SAVE_NOTHING, source_BTD
                )
            grad_x_BTD, *grad_parameters = torch.autograd.grad(y_BTD, leaves, grad_BTD)
            return [grad_x_BTD, *segments], grad_parameters

        (grad_x_BTD, *_), grad_stacked = layers.scan(body, [grads[0], *segments], stacked, kept, [inputs])
        grad_parameters = [grad.to(tensor.dtype) for grad, tensor in zip(grad_stacked, stacked, strict=True)]
        return None, grad_x_BTD, None, *grad_parameters
