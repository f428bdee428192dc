"""Muon's orthogonalization on a mesh: each device takes a share of the matrices, and the results are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch_xla.distributed.spmd as xs
from torch import Tensor

from pretrain_xla.optim.matrices import map_stacks_of, pad_stack
from pretrain_xla.runtime.sharding import Axis, parameter_axes, ways
from pretrain_xla.runtime.xla.local_shards import constrain_sharding

ALL_AXES = ("data", "fsdp", "tensor")


def map_on_mesh(
    function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor], mesh: xs.Mesh
) -> dict[str, Tensor]:
    """`MapMatrices` under SPMD: the stack is split by matrices over all devices, and the result as the parameters are.

    The partitioner makes one all-gather a stack of it where parameters are replicated, and one all-to-all in each direction
    where they are sharded.
    """
    devices = ways(ALL_AXES, mesh.shape())

    def axes_of(name: str) -> tuple[Axis, ...]:
        # An axis of one device splits nothing: parameters that differ in such axes alone may share a stack.
        return tuple(axis if ways(axis, mesh.shape()) > 1 else None for axis in parameter_axes(name)[-2:])

    def spread(stack_NRC: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        by_matrix: tuple[Axis, ...] = (ALL_AXES, None, None)
        padded_NRC = constrain_sharding(pad_stack(stack_NRC, devices), by_matrix, mesh)
        result_NRC = constrain_sharding(function(padded_NRC), by_matrix, mesh)
        return constrain_sharding(result_NRC[: len(stack_NRC)], (None, *axes), mesh)

    return map_stacks_of(spread, matrices, kind=axes_of)
