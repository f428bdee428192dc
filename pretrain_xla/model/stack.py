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


def run_blocks(blocks: Sequence[nn.Module], x_BTD: Tensor, rotary: RotaryTables | None, execution: Execution) -> Tensor:
    """Blocks in turn on x_BTD, each called as `block(x_BTD, rotary)`, in the way that `execution` asks for."""
    policy = execution.rematerialization
    if execution.loop is not None and execution.scan_layers:
        return _run_stack(blocks, x_BTD, rotary, policy != "full", execution.loop, no_fence)
    for block in blocks:
        if policy == "none" or not torch.is_grad_enabled():
            x_BTD = block(x_BTD, rotary)
        elif execution.loop is not None:
            x_BTD = _run_stack([block], x_BTD, rotary, policy == "selective", python_loop, execution.fence)
        elif policy == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
            x_BTD = checkpoint(block, x_BTD, rotary, use_reentrant=False, context_fn=contexts)
        else:
            x_BTD = checkpoint(block, x_BTD, rotary, use_reentrant=False)
    return x_BTD


def _run_stack(
    blocks: Sequence[nn.Module], x_BTD: Tensor, rotary: RotaryTables | None, keep: bool, loop: Loop, fence: Fence
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
    result: Tensor = _Stack.apply(program, x_BTD, *stacked)
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

    def call(self, x_BTD: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The block with the given parameters in place of its own."""
        by_name = dict(zip(self.names, parameters, strict=True))
        output: Tensor = torch.func.functional_call(self.block, by_name, (x_BTD, self.rotary))
        return output


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, x_BTD: Tensor, *stacked: Tensor) -> Tensor:
        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            with recording() as kept:
                y_BTD = program.call(carried[0], slices)
            return [y_BTD], [carried[0], *(kept if program.keep else [])] if program.backward else []

        (y_BTD,), kept = program.loop(body, [x_BTD], stacked)
        ctx.program = program
        ctx.save_for_backward(*kept, *stacked)
        ctx.kept_count = len(kept)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        program: _Program = ctx.program
        count = ctx.kept_count

        def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            grad_BTD, *slices = program.fence([carried[0], *slices])
            x_BTD, *values = (tensor.detach() for tensor in slices[:count])
            leaves = [x_BTD.requires_grad_(), *(tensor.detach().requires_grad_() for tensor in slices[count:])]
            with torch.enable_grad():
                if program.keep:
                    with replaying(values):
                        y_BTD = program.call(leaves[0], leaves[1:])
                else:
                    y_BTD = program.call(leaves[0], leaves[1:])
            grad_x_BTD, *grad_parameters = torch.autograd.grad(y_BTD, leaves, grad_BTD)
            return [grad_x_BTD], grad_parameters

        (grad_x_BTD,), grad_stacked = program.loop(body, [grads[0]], ctx.saved_tensors, reverse=True)
        return None, grad_x_BTD, *grad_stacked
