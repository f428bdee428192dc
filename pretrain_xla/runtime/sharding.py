"""One table from parameter name to mesh axes.

It drives XLA SPMD. A pattern is matched by `fnmatch` against the parameter's name, the first match wins, and every parameter
must match one: a new layer that is missing here is an error, not a silently replicated tensor.

The tensor axis follows Megatron-LM (Shoeybi et al. 2019): the first product of a pair is split by output, the second by
input, so one all-reduce closes each of attention and feed-forward. The fsdp axis takes the other dimension of each
matrix, as in ZeRO-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pretrain_xla.config import ModelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.model.xla.stacked import is_stacked

Axis = str | tuple[str, ...] | None

BATCH: tuple[str, ...] = ("data", "fsdp")
"""Axes that split the rows of a batch."""

PARAMETERS: dict[str, tuple[Axis, ...]] = {
    "embedding.weight": ("tensor", "fsdp"),
    "head.weight": ("tensor", "fsdp"),
    "position_embedding.weight": (None, "fsdp"),
    "blocks.*.attention.*_norm.weight": (None,),
    "blocks.*.attention.output.weight": ("fsdp", "tensor"),
    "blocks.*.attention.output.bias": (None,),
    "blocks.*.attention.*.weight": ("tensor", "fsdp"),
    "blocks.*.attention.*.bias": ("tensor",),
    "blocks.*.feed_forward.down.weight": ("fsdp", "tensor"),
    "blocks.*.feed_forward.down.bias": (None,),
    "blocks.*.feed_forward.*.weight": ("tensor", "fsdp"),
    "blocks.*.feed_forward.*.bias": ("tensor",),
    "*norm.weight": (None,),
    "*norm.bias": (None,),
}
"""Parameter → mesh axis of each dimension: of a weight (output, input), as in `nn.Linear.weight`, of an embedding (rows, D)."""

ACTIVATIONS: dict[str, tuple[Axis, ...]] = {
    "embedding": (BATCH, None, None),
    "blocks.*": (BATCH, None, None),
}
"""Module → axes of its output [B, T, D], whose sharding is constrained: it keeps the compiler from gathering the batch."""


def lookup(table: dict[str, tuple[Axis, ...]], name: str) -> tuple[Axis, ...] | None:
    """The axes of the first pattern that matches `name`; a `*` does not match a dot, unless the pattern begins with it."""
    for pattern, axes in table.items():
        if fnmatchcase(name, pattern) and (name.count(".") == pattern.count(".") or pattern.startswith("*")):
            return axes
    return None


def ways(axis: Axis, mesh: Mapping[str, int]) -> int:
    """Number of shards of a dimension along `axis`."""
    return math.prod(mesh[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def parameter_axes(name: str) -> tuple[Axis, ...]:
    """Mesh axes of each dimension of a parameter.

    Raises:
        KeyError: the table has no row for it, which is a bug.
    """
    axes = lookup(PARAMETERS, name)
    if axes is None:
        raise KeyError(f"no row for parameter {name!r} in runtime/sharding.py")
    return (None, *axes) if is_stacked(name) else axes


def resolve_mesh(sizes: Sequence[int], device_count: int) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor), with data = -1 filled in.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    data, fsdp, tensor = sizes
    if data == -1:
        data = device_count // (fsdp * tensor)
    if data * fsdp * tensor != device_count or data == 0:
        raise UserError(
            f"mesh data={sizes[0]} x fsdp={fsdp} x tensor={tensor} does not make {device_count} device(s): "
            "set --mesh-data, --mesh-fsdp and --mesh-tensor so that their product is the number of devices"
        )
    return data, fsdp, tensor


def check_model_fits(model: ModelConfig, tensor: int) -> None:
    """Refuse a tensor axis that would split a head.

    Raises:
        UserError: heads, key/value heads or d_ff are not divisible by `tensor`.
    """
    for key, size in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads), ("d_ff", model.d_ff)):
        if size % tensor:
            raise UserError(
                f"mesh_tensor={tensor} does not divide {key}={size}: choose a divisor of it, or shard with --mesh-fsdp"
            )
