"""`optimize_for_torch`: what saves memory in plain PyTorch, activation checkpoints and a loss in chunks, put into a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain_xla.model.attention import Segments
from pretrain_xla.model.execution import Execution
from pretrain_xla.model.gpt import GPT, Blocks
from pretrain_xla.model.layers import RotaryTables
from pretrain_xla.model.rewriting import rewritten
from pretrain_xla.model.xla.context import ONE_DEVICE, python_scan
from pretrain_xla.model.xla.linear_loss import LinearLossGPT

KEPT_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What is kept under selective rematerialisation: matrix products and fused attention."""


def optimize_for_torch(model: GPT, execution: Execution) -> GPT:
    """The model, run as `execution` says. There is no loop that compiles here, so that `scan_layers` has no effect."""
    if execution.rematerialization != "none":
        blocks = CheckpointedBlocks(model.blocks.children(), selective=execution.rematerialization == "selective")
        model = rewritten(model, GPT, blocks=blocks.train(model.training))
    if execution.loss_chunk is not None:
        chunk = execution.loss_chunk
        model = rewritten(model, LinearLossGPT, chunk=chunk, scan=python_scan, layout=ONE_DEVICE)
    return model


class CheckpointedBlocks(Blocks):
    """Blocks that keep their inputs for the backward pass, and with `selective` their products and attention, too."""

    def __init__(self, blocks: Iterable[nn.Module], *, selective: bool) -> None:
        super().__init__(blocks)
        self._selective = selective

    def forward(self, x_BTD: Tensor, rotary: RotaryTables | None, segments: Segments = None) -> Tensor:
        """See `Blocks.forward`."""
        contexts = functools.partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
        for block in self:
            if not torch.is_grad_enabled():
                x_BTD = block(x_BTD, rotary, segments)
            elif self._selective:
                x_BTD = checkpoint(block, x_BTD, rotary, segments, use_reentrant=False, context_fn=contexts)
            else:
                x_BTD = checkpoint(block, x_BTD, rotary, segments, use_reentrant=False)
        return x_BTD
