"""What the TPU's version of the model needs of the compiler and the mesh, as values that are passed to it.

In plain Python a scan is a loop, an optimization barrier does nothing, and one device has the whole batch. The xla runtime
passes others with the same meaning: `runtime/xla/scan.py`, `runtime/xla/local_shards.py`, `runtime/xla/kernels.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain_xla.model.xla.attention import AttentionKernel

Barrier = Callable[[list[Tensor]], list[Tensor]]
"""An optimization barrier: the same tensors, of which a compiler believes that none of them is there before all are."""

Body = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(carry, this iteration's slices) → (new carry, this iteration's results)."""


class Scan(Protocol):
    """Runs a body over the leading dimension of tensors, as `jax.lax.scan` does."""

    def __call__(
        self,
        body: Body,
        carry: Sequence[Tensor],
        slices: Sequence[Tensor] = (),
        backwards: Sequence[Tensor] = (),
        before: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the body N times.

        Args:
            body: called with lists of tensors; must keep the shapes and types of the carry, and change nothing in place.
            carry: first value of what goes from one iteration to the next; weights that the body uses belong here too.
            slices: tensors of equal leading length N; iteration i sees element i of each.
            backwards: likewise, but iteration i sees element N - 1 - i; the body finds them behind those of `slices`.
            before: likewise, but an iteration sees the element before that, N - 2 - i, and the last one the last element.

        Returns:
            The last carry, and each result stacked over the N iterations, in the order in which they ran.
        """


def python_scan(
    body: Body,
    carry: Sequence[Tensor],
    slices: Sequence[Tensor] = (),
    backwards: Sequence[Tensor] = (),
    before: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """`Scan` in plain Python."""
    state = list(carry)
    results: list[list[Tensor]] = []
    count = scan_length(slices, backwards, before)
    for index in range(count):
        elements = [tensor[index] for tensor in slices]
        elements += [tensor[count - 1 - index] for tensor in backwards]
        elements += [tensor[count - 2 - index] for tensor in before]  # -1 is the last
        state, result = body(state, elements)
        results.append(result)
    return state, [torch.stack(column) for column in zip(*results, strict=True)]


def scan_length(*stacked: Sequence[Tensor]) -> int:
    """Number of iterations of a scan over these: N."""
    return len(next(tensor for tensors in stacked for tensor in tensors))


def no_barrier(tensors: list[Tensor]) -> list[Tensor]:
    """`Barrier` where nothing is compiled."""
    return tensors


Dimension = Literal["batch", "vocabulary", "width"] | None
"""What a dimension of a tensor counts: shards of the batch, rows of a table over the vocabulary, their width. None means
another."""


class Layout(Protocol):
    """How a batch lies on devices.

    A compiler that partitions a program for a mesh sees one tensor of the whole batch. A chunk cut from it as it stands is
    tokens of few devices, and the others wait. So whatever takes a batch chunk by chunk asks here how many shards it has,
    and takes a chunk of each.
    """

    def shards(self, rows: int) -> int:
        """Into how many equal shards `rows` rows are split, each on devices of its own, the first rows first."""

    def constrain(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """The tensor, its sharding constrained by what its dimensions count; along None, each device has all of it."""


class OneDevice:
    """`Layout` where a device computes on tensors of its own."""

    def shards(self, rows: int) -> int:
        """See `Layout.shards`."""
        return 1

    def constrain(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """See `Layout.constrain`."""
        return tensor


ONE_DEVICE: Layout = OneDevice()


@dataclasses.dataclass(frozen=True)
class XlaContext:
    """Where a model is traced: over the global batch, which the compiler partitions, or over one device's shard of it.

    scan: runs layers and chunks. barrier: keeps the compiler from merging a second computation with the first. layout: of
    the batch. kernel: attention on the projections. None means there is no kernel.
    """

    scan: Scan = python_scan
    barrier: Barrier = no_barrier
    layout: Layout = ONE_DEVICE
    kernel: AttentionKernel | None = None
