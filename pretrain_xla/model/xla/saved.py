"""Values that a block saves for its recomputation in the backward pass.

A block under rematerialisation runs twice: forward, and once more inside backward, to have autograd's graph again. It passes
its matrix products and its attention through `save`. The first run records these values; in the second they take the place of
what would be computed again. What lies between them (norms, activations, casts) is recomputed, and costs next to nothing: XLA
fuses it into the products that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Save:
    """The `save` of a block that runs once: every value stays as it is."""

    def __call__(self, value: Tensor) -> Tensor:
        """The value, or in a second run the recorded one, with the gradient flowing where it would have flowed."""
        return value

    def outputs(self, compute: Callable[[], Sequence[Tensor]], count: int) -> list[Tensor]:
        """The `count` values of `compute()`, which a second run does not call.

        For the forward of an `autograd.Function`, whose values have no gradient history.
        """
        values = list(compute())
        assert len(values) == count
        return values


SAVE_NOTHING = Save()


class Record(Save):
    """Of a first run. values: what was saved, in order."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def __call__(self, value: Tensor) -> Tensor:
        """See `Save`."""
        self.values.append(value.detach())
        return value

    def outputs(self, compute: Callable[[], Sequence[Tensor]], count: int) -> list[Tensor]:
        """See `Save.outputs`."""
        values = super().outputs(compute, count)
        self.values.extend(values)
        return values


class Replay(Save):
    """Of a second run."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = list(values)

    def __call__(self, value: Tensor) -> Tensor:
        """See `Save`."""
        replaced: Tensor = _Replace.apply(value, self._values.pop(0))
        return replaced

    def outputs(self, compute: Callable[[], Sequence[Tensor]], count: int) -> list[Tensor]:
        """See `Save.outputs`."""
        return [self._values.pop(0) for _ in range(count)]


class _Replace(torch.autograd.Function):
    """Forward: the recorded value. Backward: the gradient of the computed one."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, recorded: Tensor) -> Tensor:
        return recorded.view_as(recorded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
