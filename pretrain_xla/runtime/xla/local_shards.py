"""Code that each device runs on its own local shard of a tensor, and the way there and back.

What lies between `local_shard` and `global_tensor` is left alone by XLA's partitioner (manual sharding, JAX's `shard_map`):
kernels, which it cannot split, and whatever should be reduced at a time of our choosing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from pretrain_xla.model.xla.context import Dimension
from pretrain_xla.runtime.sharding import BATCH, Axis, ways


def backward_in_this_thread() -> AbstractContextManager[object]:
    """While it is open, autograd traces backward passes in the thread that asks for them.

    Its own thread for the device frees the last tensors a little after it has handed over the gradients. A sync that comes
    first takes them for results that somebody wants: the graph is another one, and compiled anew, or, where they come from the
    placeholders of a loop's body, it runs on memory that is not there, and the process dies.
    """
    return torch.autograd.set_multithreading_enabled(False)


def local_shard(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """Each device's shard of a tensor that is split along `axes`."""
    inner = _mark(tensor * 1, axes, mesh)  # a mark on an input of the graph would move its data
    found: Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(inner)
    return found


def global_tensor(shard: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The tensor of which every device holds a shard."""
    sizes = mesh.shape()
    shape = [length * ways(axis, sizes) for length, axis in zip(shard.shape, axes, strict=True)]
    mark_manual(shard)
    found: Tensor = torch_xla._XLAC._spmd_shard_to_full_shape(
        shard, mesh.get_op_sharding(axes), torch.Size(shape), shard.dtype
    )
    return found


def mark_manual(tensor: Tensor) -> Tensor:
    """The tensor, marked in place as each device's own: the partitioner leaves it alone."""
    torch_xla._XLAC._mark_manual_sharding(tensor, torch_xla._XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
    return tensor


def constrain_sharding(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The tensor, and its gradient, split along `axes`."""
    found: Tensor = _ConstrainSharding.apply(tensor, axes, mesh)
    return found


AXIS: dict[Dimension, Axis] = {"batch": BATCH, "vocabulary": "tensor", "width": "fsdp", None: None}
"""As the table in `sharding.py` has them."""


class MeshLayout:
    """`model.xla.context.Layout` of a batch over a mesh."""

    def __init__(self, mesh: xs.Mesh) -> None:
        self._mesh = mesh

    def shards(self, rows: int) -> int:
        """See `Layout.shards`. Rows that do not divide over the devices, as no step has them, are one shard."""
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
    """What `xs.mark_sharding` does, less what takes it milliseconds at each call: looking for a package (torchax) that is not
    there, and, for a mark with a gradient, writing the mesh out and reading it again.
    """
    torch_xla._XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(axes))
    return tensor
