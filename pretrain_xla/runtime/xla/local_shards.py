"""Code that each device runs on its own part of a tensor, and the way there and back.

What lies between `part` and `whole` is left alone by XLA's partitioner (manual sharding, JAX's `shard_map`): kernels, which it
cannot split, and whatever should be reduced at a time of our choosing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from pretrain_xla.model.split import Dimension
from pretrain_xla.runtime.sharding import BATCH, Axis, ways


class _Inside:
    """The mesh whose devices' parts the traced code runs on, if it does.

    Of the process: under SPMD a process traces one thing at a time.
    """

    mesh: xs.Mesh | None = None


_inside = _Inside()


def backward_here() -> AbstractContextManager[object]:
    """While it is open, autograd traces backward passes in the thread that asks for them.

    Its own thread for the device lets go of the last tensors a little after it has handed over the gradients. A sync that comes
    first takes them for results that somebody wants: the graph is another one, and compiled anew, or, where they come from the
    placeholders of a loop's body, it runs on memory that is not there, and the process dies.
    """
    return torch.autograd.set_multithreading_enabled(False)


@contextmanager
def on_parts(mesh: xs.Mesh) -> Iterator[None]:
    """While it is open, what is traced runs on parts."""
    before, _inside.mesh = _inside.mesh, mesh
    try:
        yield
    finally:
        _inside.mesh = before


def belonging(tensor: Tensor) -> Tensor:
    """A tensor made on the spot, of zeros for instance, as a part among parts; the tensor itself where there are none.

    The partitioner finds out by itself for what a calculation reads, but not for what enters a loop.
    """
    if _inside.mesh is None:
        return tensor
    inner = tensor.clone()
    torch_xla._XLAC._mark_manual_sharding(inner, torch_xla._XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
    return inner


def everywhere(tensor: Tensor) -> Tensor:
    """A tensor that every device has whole, as a part among parts; the tensor itself where there are none."""
    return tensor if _inside.mesh is None else part(tensor, (None,) * tensor.dim(), _inside.mesh)


def part(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """One device's part of a tensor that is split along `axes`."""
    inner = _mark(tensor * 1, axes, mesh)  # a mark on an input of the graph would move its data
    found: Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(inner)
    return found


def whole(part: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The tensor of which every device holds a part."""
    sizes = mesh.shape()
    shape = [length * ways(axis, sizes) for length, axis in zip(part.shape, axes, strict=True)]
    torch_xla._XLAC._mark_manual_sharding(part, torch_xla._XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
    found: Tensor = torch_xla._XLAC._spmd_shard_to_full_shape(
        part, mesh.get_op_sharding(axes), torch.Size(shape), part.dtype
    )
    return found


def pinned(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """The tensor, and its gradient, split along `axes`."""
    found: Tensor = _Pinned.apply(tensor, axes, mesh)
    return found


AXIS: dict[Dimension, Axis] = {"batch": BATCH, "vocabulary": "tensor", "width": "fsdp", None: None}
"""As the table in `sharding.py` has them."""


class MeshSplit:
    """`model.split.Split` over a mesh: in code that sees the whole batch, and in code that runs on parts."""

    def __init__(self, mesh: xs.Mesh) -> None:
        self._mesh = mesh

    def parts(self, rows: int) -> int:
        """See `Split.parts`. Rows that do not divide over the devices, as no step has them, are one part."""
        count = 1 if _inside.mesh is not None else ways(BATCH, self._mesh.shape())
        return 1 if rows % count else count

    def keep(self, tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
        """See `Split.keep`."""
        if _inside.mesh is not None:
            return tensor
        axes = tuple(AXIS[dimension] for dimension in dimensions)
        return pinned(tensor * 1, axes, self._mesh)  # see `part`


class _Pinned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
        ctx.axes, ctx.mesh = axes, mesh
        return _mark(tensor.clone(), axes, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _mark(grads[0].clone(), ctx.axes, ctx.mesh), None, None


def _mark(tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh) -> Tensor:
    """What `xs.mark_sharding` does, less what that spends milliseconds on at each call: looking for a package (torchax) that is
    not there, and, for a mark with a gradient, writing the mesh out and reading it again.
    """
    torch_xla._XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(axes))
    return tensor
