"""Running a stack of equal blocks: one after another, or as one loop, keeping all or little for the backward pass.

Plain autograd keeps every intermediate value of every block. A rematerialised stack keeps each block's input and what the
block `remember`s, and runs the block again in backward. With a `Loop` that compiles, the program holds one block instead of
a copy for each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain_xla.model.loops import Fence, Loop, no_fence, python_loop
from pretrain_xla.model.remember import recording, replaying

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
    blocks: Sequence[nn.Module],
    x_BTD: Tensor,
    rotary: RotaryTables | None,
    segments_BT: Tensor | None,
    execution: Execution,
) -> Tensor:
    """Blocks in turn on x_BTD, each called with the tables and segments, in the way that `execution` asks for."""
    shared = (rotary, None, segments_BT)  # as `Block.forward` takes them; nothing stands in for attention
    policy = execution.rematerialization
    if execution.loop is not None and execution.scan_layers:
        return _run_stack(blocks, x_BTD, rotary, segments_BT, policy != "full", execution.loop, no_fence)
    for block in blocks:
        if policy == "none" or not torch.is_grad_enabled():
            x_BTD = block(x_BTD, *shared)
        elif execution.loop is not None:
            keep = policy == "selective"
            x_BTD = _run_stack([block], x_BTD, rotary, segments_BT, keep, python_loop, execution.fence)
        elif policy == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
            x_BTD = checkpoint(block, x_BTD, *shared, use_reentrant=False, context_fn=contexts)
        else:
            x_BTD = checkpoint(block, x_BTD, *shared, use_reentrant=False)
    return x_BTD


def _run_stack(
    blocks: Sequence[nn.Module],
    x_BTD: Tensor,
    rotary: RotaryTables | None,
    segments_BT: Tensor | None,
    keep: bool,
    loop: Loop,
    fence: Fence,
) -> Tensor:
    """One loop over the blocks. keep: keep what the blocks remember, or nothing but their inputs."""
    names = [name for name, _ in blocks[0].named_parameters()]
    dtype = blocks[0].compute_dtype
    # Matrices are cast before they are stacked: the loop then reads half the bytes, and the cast is the copy.
    stacked = [
        torch.stack([parameter.to(dtype) if parameter.dim() > 1 else parameter for parameter in column])
        for column in zip(*(block.parameters() for block in blocks), strict=True)
    ]
    program = _Program(blocks[0], names, rotary, loop, fence, keep, backward=torch.is_grad_enabled())
    result: Tensor = _Stack.apply(program, x_BTD, segments_BT, *stacked)
    return result


class _Program:
    """What a stack computes, without its tensors."""

    def __init__(
        self,
        block: nn.Module,
        names: list[str],
        rotary: RotaryTables | None,
        loop: Loop,
        fence: Fence,
        keep: bool,
        *,
        backward: bool,
    ) -> None:
        self.block, self.names, self.rotary = block, names, rotary
        self.loop, self.fence, self.keep, self.backward = loop, fence, keep, backward

    def call(self, x_BTD: Tensor, parameters: Sequence[Tensor], segments: Sequence[Tensor]) -> Tensor:
        """The block with the given parameters in place of its own. segments: the one tensor, or nothing."""
        by_name = dict(zip(self.names, parameters, strict=True))
        arguments = (x_BTD, self.rotary, None, *segments)
        output: Tensor = torch.func.functional_call(self.block, by_name, arguments)
        return output


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, x_BTD: Tensor, segments_BT: Tensor | None, *stacked: Tensor) -> Tensor:
        # Carried through the loop, though they never change: found by the body, they would be computed anew in each turn.
        segments = [] if segments_BT is None else [segments_BT]

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            x_BTD, *segments = carried
            with recording() as kept:
                y_BTD = program.call(x_BTD, slices, segments)
            return [y_BTD, *segments], [x_BTD, *(kept if program.keep else [])] if program.backward else []

        (y_BTD, *_), kept = program.loop(body, [x_BTD, *segments], stacked)
        ctx.program = program
        ctx.save_for_backward(*segments, *kept, *stacked)
        ctx.segments_count, ctx.kept_count = len(segments), len(kept)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        program: _Program = ctx.program
        count = ctx.kept_count
        segments, saved = ctx.saved_tensors[: ctx.segments_count], ctx.saved_tensors[ctx.segments_count :]

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            grad_BTD, *segments = carried
            grad_BTD, *slices = program.fence([grad_BTD, *slices])
            x_BTD, *values = (tensor.detach() for tensor in slices[:count])
            leaves = [x_BTD.requires_grad_(), *(tensor.detach().requires_grad_() for tensor in slices[count:])]
            with torch.enable_grad():
                if program.keep:
                    with replaying(values):
                        y_BTD = program.call(leaves[0], leaves[1:], segments)
                else:
                    y_BTD = program.call(leaves[0], leaves[1:], segments)
            grad_x_BTD, *grad_parameters = torch.autograd.grad(y_BTD, leaves, grad_BTD)
            return [grad_x_BTD, *segments], grad_parameters

        (grad_x_BTD, *_), grad_stacked = program.loop(body, [grads[0], *segments], saved, reverse=True)
        return None, grad_x_BTD, None, *grad_stacked
