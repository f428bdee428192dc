"""How a batch is split over devices, as far as a model must know it.

A compiler that partitions a program for a mesh sees one tensor of the whole batch. Cut into chunks as it stands, a chunk is
tokens of few devices, and the others wait or are sent what they do not have. So whatever takes a batch piece by piece asks here
how many parts of it lie on devices of their own, and takes a piece of each.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Dimension = Literal["batch", "vocabulary", "width"] | None
"""What a dimension of a tensor counts: parts of the batch, rows of a table over the vocabulary, their width; none: another."""


class Split(Protocol):
    """How the rows of a batch lie on devices. The device count may change from one trace to the next, so ask each time."""

    def parts(self, rows: int) -> int:
        """Into how many equal parts `rows` rows are split, each on devices of its own, the first rows first."""

    def keep(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """The tensor, laid over the devices by what its dimensions are; along none, each device has all of it."""


class Whole:
    """`Split` where each device, or the only one, computes on tensors of its own."""

    def parts(self, rows: int) -> int:
        """See `Split.parts`."""
        return 1

    def keep(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """See `Split.keep`."""
        return tensor


WHOLE: Split = Whole()
