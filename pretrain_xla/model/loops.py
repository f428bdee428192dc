"""A loop as a value: what runs the same function over the slices of stacked tensors.

In plain PyTorch that is a Python loop. The xla runtime hands the model another one with the same meaning, which becomes a
single loop of the compiled program instead of a copy of its body for each turn (`runtime/xla/scan.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Fence = Callable[[list[Tensor]], list[Tensor]]
"""The same tensors, of which a compiler believes that none of them is there before all are."""

Body = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(what is carried, this turn's slices) → (what is carried on, this turn's results)."""


class Loop(Protocol):
    """Runs a body over the leading dimension of its slices, as `jax.lax.scan` does."""

    def __call__(
        self,
        body: Body,
        carried: Sequence[Tensor],
        slices: Sequence[Tensor] = (),
        backwards: Sequence[Tensor] = (),
        before: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the loop.

        Args:
            body: called with lists of tensors; must keep the carried shapes and types, and change nothing in place.
            carried: first value of what goes from turn to turn; weights that the body uses belong here too.
            slices: tensors of equal leading length N; turn i sees element i of each.
            backwards: likewise, but turn i sees element N - 1 - i of each; the body finds them behind those of `slices`.
            before: likewise, but each turn sees the element before that, N - 2 - i, and the last turn the last element.

        Returns:
            What was carried out of the last turn, and each result stacked over the N turns, in the order in which they ran.
        """


def python_loop(
    body: Body,
    carried: Sequence[Tensor],
    slices: Sequence[Tensor] = (),
    backwards: Sequence[Tensor] = (),
    before: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """`Loop` in plain Python."""
    state = list(carried)
    results: list[list[Tensor]] = []
    count = turns(slices, backwards, before)
    for index in range(count):
        elements = [tensor[index] for tensor in slices]
        elements += [tensor[count - 1 - index] for tensor in backwards]
        elements += [tensor[count - 2 - index] for tensor in before]  # -1 is the last
        state, result = body(state, elements)
        results.append(result)
    return state, [torch.stack(column) for column in zip(*results, strict=True)]


def turns(*stacked: Sequence[Tensor]) -> int:
    """How often a loop over these runs: N."""
    return len(next(tensor for tensors in stacked for tensor in tensors))


def no_fence(tensors: list[Tensor]) -> list[Tensor]:
    """`Fence` where nothing is compiled."""
    return tensors
