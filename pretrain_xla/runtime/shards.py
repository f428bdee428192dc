"""Which part of a run's state each process copies to its host and writes, or reads, so that no host ever holds all of it.

A tensor that every process holds whole is cut along its first dimension. A tensor that is sharded over a mesh is written as it
lies on the devices, and each of its blocks by one of the processes that hold it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain_xla.model.xla.stacked import ALL

SMALLEST_PIECE = 1 << 18
"""Bytes below which a tensor is not cut: each piece costs about 1 kB in a checkpoint's files."""

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""A block of a tensor: the offsets of its first element, and its shape."""

Read = Callable[[str, Sequence[Region]], list[Tensor]]
"""(name, regions) → these regions of the tensor that is saved under that name, on the host."""


@dataclass(frozen=True)
class Shard:
    """A block of a tensor, on the host.

    name: of the tensor. shape: of the whole tensor. offsets: of the block's first element, one for each dimension. block: its
    values; its shape is that of the block.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    block: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a tensor's first dimension; of a 0-d tensor, its only element."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows, as a view."""
        return tensor[self.start : self.stop] if tensor.dim() else tensor

    def shard(self, tensor: Tensor, block: Tensor) -> Shard:
        """`block`, a host copy of these rows of `tensor`, as a shard."""
        return Shard(self.name, tuple(tensor.shape), (self.start, *(0,) * (tensor.dim() - 1))[: tensor.dim()], block)


def whole_region(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return (0,) * len(shape), tuple(shape)


def within(region: Region) -> tuple[slice, ...]:
    """The index that takes a region out of its tensor."""
    return tuple(slice(start, start + size) for start, size in zip(*region, strict=True))


def overlap(one: Region, other: Region) -> Region | None:
    """What two regions of a tensor have in common. None means nothing."""
    starts = tuple(map(max, one[0], other[0]))
    ends = [min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True)]
    shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, shape) if all(size > 0 for size in shape) else None


def relative(region: Region, to: Region) -> tuple[slice, ...]:
    """The index that takes a region out of another one that contains it."""
    return within((tuple(a - b for a, b in zip(region[0], to[0], strict=True)), region[1]))


def whole(tensors: Mapping[str, Tensor]) -> list[Shard]:
    """Host tensors, each as one shard."""
    return [Shard(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items()]


def divide_rows(tensors: Mapping[str, Tensor], index: int, count: int) -> list[Rows]:
    """The share of process `index` of `count` of tensors that all of them hold whole: about as many bytes for each.

    A pure function of names, shapes and types, so that all processes agree without a word.
    """
    loads = [(0, process) for process in range(count)]
    mine: list[Rows] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: -_bytes(item[1])):
        rows = tensor.shape[0] if tensor.dim() else 1
        pieces = max(min(count, rows, _bytes(tensor) // SMALLEST_PIECE), 1)
        for piece in range(pieces):
            part = Rows(name, rows * piece // pieces, rows * (piece + 1) // pieces)
            load, process = heapq.heappop(loads)
            heapq.heappush(loads, (load + _bytes(tensor) // pieces, process))
            if process == index:
                mine.append(part)
    return mine


@dataclass(frozen=True)
class Tiling:
    """How a tensor is sharded. ways: blocks along each dimension. replicas: copies of each block on the devices of the mesh."""

    ways: tuple[int, ...]
    replicas: int

    @property
    def blocks(self) -> int:
        """Number of different blocks."""
        return math.prod(self.ways)

    def number(self, shape: Sequence[int], offsets: Sequence[int]) -> int:
        """Which block begins at `offsets`, counted from 0; XLA pads a dimension that does not divide."""
        number = 0
        for size, ways, offset in zip(shape, self.ways, offsets, strict=True):
            number = number * ways + offset // -(-size // ways)
        return number

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a block of a tensor of this shape on a device, with XLA's padding."""
        return tuple(-(-size // ways) for size, ways in zip(shape, self.ways, strict=True))

    def writer(self, number: int, before: int) -> int:
        """Which replica of a block is written.

        The blocks of all tensors are written by the replicas in rotation, so that not all fall to the processes that hold the
        first one. before: blocks of the tensors before this one.
        """
        return (before + number) % self.replicas


def unstack_shards(shards: Iterable[Shard]) -> Iterator[Shard]:
    """The same shards by the names of single layers, as checkpoints have them; see `model.xla.stacked`."""
    for shard in shards:
        if ALL not in shard.name:
            yield shard
            continue
        layers = shard.shape[0]
        for row, block in enumerate(shard.block):
            layer = layers - 1 - (shard.offsets[0] + row)  # the last layer comes first
            yield Shard(shard.name.replace(ALL, f"blocks.{layer}."), shard.shape[1:], shard.offsets[1:], block)


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * torch.empty(0, dtype=tensor.dtype).element_size()
