"""Host copies of one process's share of the state; see `runtime.shards`.

A sharded tensor is copied as it lies on the devices. It is not gathered: that would take a program of its own, and on every
host the memory of the whole tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch_xla
import torch_xla.runtime as xr
from torch import Tensor

from pretrain_xla.runtime.shards import Shard, Tiling, divide_rows

_TILES = re.compile(r"\{devices=\[([\d,]+)\]")


def copy_own_shards(tensors: Mapping[str, Tensor], index: int, count: int) -> list[Shard]:
    """What process `index` of `count` writes of these tensors, on the host."""
    tilings = {name: tiling for name, tensor in tensors.items() if (tiling := _tiling(tensor.detach())).blocks > 1}
    shards: list[Shard] = []
    for rows in divide_rows({name: t for name, t in tensors.items() if name not in tilings}, index, count):
        tensor = tensors[rows.name].detach()
        host = tensor.cpu()
        # A slice on the device would be a program of its own.
        part = host if tensor.dim() == 0 or rows.stop - rows.start == len(host) else rows.of(host).clone()
        shards.append(rows.shard(tensor, part))
    # Processes that share no mesh hold the same state, each on devices of its own.
    alike = None if count == xr.process_count() else (index, count)
    before = 0
    for name, tiling in tilings.items():
        shards += _blocks(name, tensors[name].detach(), tiling, before, alike)
        before += tiling.blocks
    return shards


def _blocks(name: str, tensor: Tensor, tiling: Tiling, before: int, alike: tuple[int, int] | None) -> Iterator[Shard]:
    """The blocks of a sharded tensor that this process writes."""
    replicas = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
    local: Any = torch_xla._XLAC._get_local_shards([tensor])[0]
    for (data, _device), (replica, indices) in zip(local, replicas, strict=True):
        offsets = tuple(part.start for part in indices)
        block = data[tuple(slice(0, part.stop - part.start) for part in indices)]  # without the padding
        number = tiling.number(tensor.shape, offsets)
        mine = replica == tiling.writer(number, before)
        if alike is not None:
            mine = replica == 0 and (before + number) % alike[1] == alike[0]
        if mine and block.numel():
            yield Shard(name, tuple(tensor.shape), offsets, block)


def _tiling(tensor: Tensor) -> Tiling:
    """How a tensor is sharded over the mesh, by its sharding in XLA's notation: `{devices=[2,1,2]0,1,2,3 ...}`."""
    found = _TILES.match(torch_xla._XLAC._get_xla_sharding_spec(tensor))
    if found is None:
        return Tiling((1,) * tensor.dim(), 1)  # replicated, or on one device
    tiles = [int(number) for number in found[1].split(",")]
    return Tiling(tuple(tiles[: tensor.dim()]), math.prod(tiles[tensor.dim() :]))
