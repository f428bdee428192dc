"""The gradients of a step on XLA: all micro-batches in one loop of the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pretrain_xla.model.xla.context import Scan
from pretrain_xla.runtime.base import Forward, Loss
from pretrain_xla.runtime.xla.local_shards import backward_in_this_thread


class TracedModel:
    """A model as the step calls it, traced and compiled as a part of the step.

    Args:
        model: traced over the global batch, with parameters and buffers of its own.
        local: the same model traced over one device's shard of the batch, without values. None means it is not traced so.
    """

    def __init__(self, model: nn.Module, local: nn.Module | None = None) -> None:
        self.model, self.local = model, local

    def __call__(self, *arguments: object) -> Tensor:
        """The model on its own parameters."""
        result: Tensor = self.model(*arguments)
        return result

    def on(self, tensors: Mapping[str, Tensor], *, local: bool = False) -> Forward:
        """The model on given parameters and buffers, by name. local: they are one device's local shards."""
        model = self.local if local else self.model
        assert model is not None

        def forward(*arguments: object) -> Tensor:
            result: Tensor = torch.func.functional_call(model, dict(tensors), arguments)
            return result

        return forward


def accumulate(
    loss: Loss,
    forward_on: Callable[[list[Tensor]], Forward],
    values: Sequence[Tensor],
    parameters: int,
    tokens_BAS: Tensor,
    scale: Tensor | None,
    scan: Scan,
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean loss over the micro-batches and its gradients, by one loop of the program.

    Args:
        loss: mean loss of one micro-batch.
        forward_on: the model on given tensors.
        values: those tensors; the loss is differentiated by the first `parameters` of them.
        parameters: number of parameters.
        tokens_BAS: the micro-batches.
        scale: factor on the loss before differentiation. None means 1.
        scan: runs the micro-batches.
    """
    count = tokens_BAS.shape[1]

    def one(tokens_BS: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [tensor.detach().requires_grad_() for tensor in given[:parameters]]
        with torch.enable_grad(), backward_in_this_thread():
            value = loss(forward_on([*leaves, *given[parameters:]]), tokens_BS)
            return value.detach(), list(torch.autograd.grad(value, leaves, scale, allow_unused=True))

    def body(carry: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        total, sums, given = carry[0], carry[1 : 1 + parameters], carry[1 + parameters :]
        value, gradients = one(slices[0], given)
        sums = [old if new is None else old + new for old, new in zip(sums, gradients, strict=True)]
        return [total + value, *sums, *given], []

    if count == 1:
        return one(tokens_BAS[:, 0], values)
    zeros = [torch.zeros_like(tensor) for tensor in values[:parameters]]
    total = torch.zeros((), device=tokens_BAS.device)
    # Divided after the loop: with a plain sum inside, the compiler can also move a reduction over devices out of the loop.
    (total, *sums), _ = scan(body, [total, *zeros, *values], [tokens_BAS.transpose(0, 1)])
    return total / count, [gradient / count for gradient in sums[:parameters]]
