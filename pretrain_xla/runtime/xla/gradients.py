"""The gradients of a step on XLA: all micro-batches in one loop of the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pretrain_xla.runtime.xla.local_shards import backward_here
from pretrain_xla.runtime.xla.scan import xla_loop


def accumulate(
    loss: Callable[[Tensor], Tensor],
    using: Callable[[list[Tensor]], AbstractContextManager[None]],
    values: Sequence[Tensor],
    parameters: int,
    tokens_BAS: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean loss over the micro-batches and its gradients, by one loop of the program.

    using: makes the model run, forward and backward, with given tensors. values: those tensors, `parameters` first, by which
    the loss is differentiated.
    """
    count = tokens_BAS.shape[1]

    def one(tokens_BS: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [tensor.detach().requires_grad_() for tensor in given[:parameters]]
        with using([*leaves, *given[parameters:]]), torch.enable_grad(), backward_here():
            value = loss(tokens_BS)
            return value.detach(), list(torch.autograd.grad(value, leaves, scale, allow_unused=True))

    def body(carried: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        total, sums, given = carried[0], carried[1 : 1 + parameters], carried[1 + parameters :]
        value, gradients = one(slices[0], given)
        sums = [old if new is None else old + new for old, new in zip(sums, gradients, strict=True)]
        return [total + value, *sums, *given], []

    if count == 1:
        return one(tokens_BAS[:, 0], values)
    zeros = [torch.zeros_like(tensor) for tensor in values[:parameters]]
    total = torch.zeros((), device=tokens_BAS.device)
    # Divided after the loop: a plain sum in it lets the compiler move a reduction over devices out of it, too.
    (total, *sums), _ = xla_loop(body, [total, *zeros, *values], [tokens_BAS.transpose(0, 1)])
    return total / count, [gradient / count for gradient in sums[:parameters]]
