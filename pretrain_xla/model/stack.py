"""Running a stack of equal blocks: one after another, or as one loop, keeping all or little for the backward pass.

Plain autograd keeps every intermediate value of every block. A rematerialised stack keeps each block's input and what the
block `remember`s, and runs the block again in backward. With a `Loop` that compiles, the program holds one block instead of
a copy for each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain_xla.model.loops import Fence, Loop, python_loop
from pretrain_xla.model.remember import recording, replaying
from pretrain_xla.model.stacked import StackedBlocks, stack

if TYPE_CHECKING:
    from pretrain_xla.model.execution import Execution
    from pretrain_xla.model.positions import RotaryTables

KEPT_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What plain PyTorch keeps under selective rematerialisation: matrix products and fused attention."""


def run_blocks(
    blocks: StackedBlocks | nn.ModuleList,
    x_BTD: Tensor,
    rotary: RotaryTables | None,
    segments_BT: Tensor | None,
    execution: Execution,
) -> Tensor:
    """Blocks in turn on x_BTD, each called with the tables and segments, in the way that `execution` asks for."""
    shared = (rotary, None, segments_BT)  # as `Block.forward` takes them; nothing stands in for attention
    policy = execution.rematerialization
    keep = policy == "selective"
    if execution.loop is not None and execution.scan_layers:
        one_block, parameters = stack(blocks)
        return _Program(one_block, rotary, keep, execution.loop, execution.fence).run(x_BTD, segments_BT, parameters)
    block: Any
    for block in blocks:
        if policy == "none" or not torch.is_grad_enabled():
            x_BTD = block(x_BTD, *shared)
        elif execution.loop is not None:
            one = [parameter[None] for parameter in block.parameters()]
            x_BTD = _Program(block, rotary, keep, python_loop, execution.fence).run(x_BTD, segments_BT, one)
        elif policy == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
            x_BTD = checkpoint(block, x_BTD, *shared, use_reentrant=False, context_fn=contexts)
        else:
            x_BTD = checkpoint(block, x_BTD, *shared, use_reentrant=False)
    return x_BTD


LARGE = 3 * 2**20
"""Numbers of a matrix that take, in fp32, most of the 16 MiB which the TPU compiler gives one operation on the chip."""


class _Program:
    """A loop over blocks, without its tensors. keep: keep what the blocks remember, or nothing but their inputs."""

    def __init__(self, block: Any, rotary: RotaryTables | None, keep: bool, loop: Loop, fence: Fence) -> None:
        self.block, self.rotary, self.keep, self.loop, self.fence = block, rotary, keep, loop, fence
        self.compiled = loop is not python_loop
        self.names = [name for name, _ in block.named_parameters()]
        self.dtype: torch.dtype = block.compute_dtype
        self.backward = torch.is_grad_enabled()

    def run(self, x_BTD: Tensor, segments_BT: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
        """All blocks on x_BTD. parameters: in the block's order, each of all blocks, the last block first."""
        result: Tensor = _Stack.apply(self, x_BTD, segments_BT, *parameters)
        return result

    def call(
        self,
        x_BTD: Tensor,
        parameters: Sequence[Tensor],
        segments: Sequence[Tensor],
        source_BTD: Tensor | None = None,
    ) -> Tensor:
        """The block with the given parameters in place of its own. segments: the one tensor, or nothing."""
        by_name = dict(zip(self.names, parameters, strict=True))
        arguments = (x_BTD, self.rotary, None, segments[0] if segments else None, source_BTD)
        output: Tensor = torch.func.functional_call(self.block, by_name, arguments)
        return output

    def cast(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """One block's parameters, detached. Matrices in the compute type, so that their gradients are in it, too."""
        return [p.detach().to(self.dtype) if p.dim() > 1 else p.detach() for p in parameters]

    def cast_for_first_run(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """`cast`; in a loop, the product that reads a weight casts it on the way, which costs nothing, but for a large one.

        With such a one, some products take more than twice as long, and which ones is a matter of chance: of weights of 6M
        numbers the last of a block, or, when that was cast before, the two others. A cast takes a seventh of a product.
        """
        weights = self.cast(parameters)
        large = [index for index, weight in enumerate(weights) if weight.dim() > 1 and weight.numel() >= LARGE]
        if self.compiled and large:
            for index, weight in zip(large, self.fence([weights[index] for index in large]), strict=True):
                weights[index] = weight
        return weights

    def fence_input(self, x_BTD: Tensor) -> Tensor:
        """In a loop: keeps the compiler from moving a part of the first norm into the turn before, as a pass of its own."""
        return self.fence([x_BTD])[0] if self.compiled else x_BTD

    def copied(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """In a loop, a copy of a turn's input and the input, where the block takes both; the input and nothing elsewhere.

        The input lies in a stack in HBM, and a block's backward pass reads it four times. The first pass writes the copy on its
        way, and that stays on the chip where there is room for it: 1.6% of a step at 8 x 1,024 tokens of width 768, 2.5% at 16.
        It does so only if the copy is more than a slice, hence the factor: a one of which the compiler does not know that.
        """
        if not (self.compiled and self.block.takes_copy):
            return x_BTD, None
        one = self.fence([torch.ones((), device=x_BTD.device)])[0]
        return self.fence([x_BTD * one])[0], x_BTD

    def fenced(
        self, grad_BTD: Tensor, parameters: list[Tensor], kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What a second run starts from, so that it is not merged with the first.

        In a loop it cannot be. There only the weights are fenced, so that they are cast once a turn and not in every product
        that reads them: it would double the time of some in the backward pass, where they are read across. A fence for each,
        so that a cast can wait for its product (0.2% of a step); the gradient passes them, too, by which it lies better (0.1%).
        """
        if self.compiled:
            fenced = []
            for parameter in parameters:
                if parameter.dim() > 1:
                    grad_BTD, parameter = self.fence([grad_BTD, parameter])
                fenced.append(parameter)
            return grad_BTD, fenced, kept
        grad_BTD, *rest = self.fence([grad_BTD, *parameters, *kept])
        return grad_BTD, rest[: len(parameters)], rest[len(parameters) :]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, x_BTD: Tensor, segments_BT: Tensor | None, *stacked: Tensor) -> Tensor:
        # Carried through the loop, though they never change: found by the body, they would be computed anew in each turn.
        segments = [] if segments_BT is None else [segments_BT]

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            x_BTD, *segments = carried
            with recording() as kept:
                y_BTD = program.call(program.fence_input(x_BTD), program.cast_for_first_run(slices), segments)
            return [y_BTD, *segments], [y_BTD, *(kept if program.keep else [])] if program.backward else []

        (y_BTD, *_), results = program.loop(body, [x_BTD, *segments], backwards=stacked)
        ctx.program = program
        if program.backward:
            outputs, *kept = results
            # Where the last block's output is, which nobody needs, comes the first block's input; so the inputs of the others
            # are written by the products that make them, and not by passes of their own that would copy them.
            inputs = torch.select_scatter(outputs, x_BTD, 0, len(outputs) - 1)
            ctx.save_for_backward(*segments, *stacked, *kept, inputs)
            ctx.counts = len(segments), len(segments) + len(stacked)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        program: _Program = ctx.program
        first, second = ctx.counts
        *saved, inputs = ctx.saved_tensors
        segments, stacked, kept = saved[:first], saved[first:second], saved[second:]
        count = len(stacked)

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            grad_BTD, *segments = carried
            grad_BTD, parameters, kept = program.fenced(grad_BTD, program.cast(slices[:count]), slices[count:])
            *values, x_BTD = (tensor.detach() for tensor in kept)
            x_BTD, source_BTD = program.copied(x_BTD)
            leaves = [x_BTD.requires_grad_(), *(parameter.detach().requires_grad_() for parameter in parameters)]
            with torch.enable_grad(), replaying(values) if program.keep else nullcontext():
                y_BTD = program.call(x_BTD, leaves[1:], segments, source_BTD)
            grad_x_BTD, *grad_parameters = torch.autograd.grad(y_BTD, leaves, grad_BTD)
            return [grad_x_BTD, *segments], grad_parameters

        (grad_x_BTD, *_), grad_stacked = program.loop(body, [grads[0], *segments], stacked, kept, [inputs])
        grad_parameters = [grad.to(tensor.dtype) for grad, tensor in zip(grad_stacked, stacked, strict=True)]
        return None, grad_x_BTD, None, *grad_parameters
