"""The mean of the weights over the last part of a run, for validation, samples, generation and export.

Weights at a high learning rate wander around a better point, and their mean is nearer to it: Polyak and Juditsky 1992, and
Izmailov et al. 2018 (https://arxiv.org/abs/1803.05407) for networks. A decay of the learning rate to zero does much the same.
The mean costs one more tensor for each parameter, and is part of the optimizer's state: checkpoints hold it beside the weights
that training continues with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain_xla.optim.parameters import Place

AVERAGE = "average."
"""Before a parameter's name: its mean, in the optimizer's state."""


class WeightAverage:
    """The mean of the parameters after every update from number `start` + 1 on; until then the parameters themselves."""

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], start: int, place: Place) -> None:
        self.start = start
        self.names, self.parameters = list(names), list(parameters)
        self.means = [place(AVERAGE + name, p.shape, p) for name, p in zip(names, parameters, strict=True)]

    @property
    def state(self) -> dict[str, Tensor]:
        """`average.<parameter>`."""
        return {AVERAGE + name: mean for name, mean in zip(self.names, self.means, strict=True)}

    def update(self, step: Tensor, skip: Tensor | None) -> None:
        """Take in the parameters after an update.

        Args:
            step: number of updates so far, with this one (0-d int32).
            skip: whether the update was skipped (0-d bool); then the mean stays. None means that none is skipped.
        """
        share = (step - self.start).clamp(min=1).to(torch.float32).reciprocal()
        if skip is not None:
            # Before the first update that counts, the mean holds no weights yet.
            share = torch.where(skip & (step > 0), 0.0, share)
        # Products, not `lerp`: with a share of 1 or 0 the result is one of the two, bit for bit.
        torch._foreach_mul_(self.means, 1.0 - share)
        torch._foreach_add_(self.means, torch._foreach_mul(self.parameters, share))

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the values of parameters and means; a second call restores them, bit for bit."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            value = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(value)
