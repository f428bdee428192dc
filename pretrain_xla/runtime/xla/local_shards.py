"""Code that each device runs on its own local shard of a tensor, and conversions between local and global tensors.

XLA's partitioner does not touch what is between `local_shard` and `global_tensor` (manual sharding, as JAX's `shard_map`). It
is used for kernels, which cannot be partitioned, and to reduce at a time of our choosing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn

from pretrain_xla.model.xla.context import Dimension
from pretrain_xla.runtime.sharding import BATCH, Axis, ways


def backward_in_this_thread() -> AbstractContextManager[object]:
    """While it is open, autograd runs backward passes in the calling thread.

    Autograd's own thread for the device frees the last tensors shortly after it returns the gradients. A sync before that takes
    these tensors for results. Then the graph differs and is recompiled; or, if they come from the placeholders of a loop's
    body, it runs on memory that does not exist, and the process dies.
    """
    return torch.autograd.set_multithreading_enabled(False)


def local_shard(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """Each device's shard of a tensor that is sharded along `axes`."""
    inner = _mark(tensor * 1, axes, mesh)  # marking an input of the graph would move its data
    found: Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(inner)
    return found


def global_tensor(shard: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The global tensor of which every device holds a shard."""
    sizes = mesh.shape()
    shape = [length * ways(axis, sizes) for length, axis in zip(shard.shape, axes, strict=True)]
    mark_manual(shard)
    found: Tensor = torch_xla._XLAC._spmd_shard_to_full_shape(
        shard, mesh.get_op_sharding(axes), torch.Size(shape), shard.dtype
    )
    return found


def mark_manual(tensor: Tensor) -> Tensor:
    """The tensor, marked in place as manually sharded: the partitioner does not touch it."""
    torch_xla._XLAC._mark_manual_sharding(tensor, torch_xla._XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
    return tensor


def constrain_sharding(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The tensor, and its gradient, sharded along `axes`."""
    found: Tensor = _ConstrainSharding.apply(tensor, axes, mesh)
    return found


def constrain_output(mesh: xs.Mesh, axes: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A forward hook that constrains the sharding of a module's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return constrain_sharding(output, axes, mesh)

    return hook


AXIS: dict[Dimension, Axis] = {"batch": BATCH, "vocabulary": "tensor", "width": "fsdp", None: None}
"""The axes as in the table of `sharding.py`."""


class MeshLayout:
    """`model.xla.context.Layout` of a batch over a mesh."""

    def __init__(self, mesh: xs.Mesh) -> None:
        self._mesh = mesh

    def shards(self, rows: int) -> int:
        """See `Layout.shards`. Rows that do not divide over the devices, which no step has, are one shard."""
        count = ways(BATCH, self._mesh.shape())
        return 1 if rows % count else count

    def constrain(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """See `Layout.constrain`."""
        axes = tuple(AXIS[dimension] for dimension in dimensions)
        return constrain_sharding(tensor * 1, axes, self._mesh)  # see `local_shard`


class _ConstrainSharding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
        ctx.axes, ctx.mesh = axes, mesh
        return _mark(tensor.clone(), axes, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _mark(grads[0].clone(), ctx.axes, ctx.mesh), None, None


def _mark(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """`xs.mark_sharding` without what takes it milliseconds at each call: looking for a package (torchax) that is not installed
    and, for a mark with a gradient, serialising and parsing the mesh.
    """
    torch_xla._XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(axes))
    return tensor
