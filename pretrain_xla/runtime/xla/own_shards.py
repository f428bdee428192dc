"""Copying one process's share of the state to its host, and loading it from there; see `runtime.shards`.

A sharded tensor is copied as it lies on the devices. It is not gathered: that would take a program of its own, and on every
host the memory of the whole tensor. It is loaded likewise: of each tensor, a host reads what its own devices hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.runtime as xr
from torch import Tensor

from pretrain_xla.runtime.rows import device_numbers
from pretrain_xla.runtime.shards import Read, Region, Shard, Tiling, divide_rows, whole_region, within

_TILES = re.compile(r"\{devices=\[([\d,]+)\]")
_DEVICES = re.compile(r"\{devices=\[[\d,]+\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))")


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


def place_or_reserve(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; of one on the meta device, memory that `load_own_shards` gives its values."""
    if not tensor.is_meta:
        return tensor.to(device)
    # Not `empty_like`: that is a view of a tensor, which would be in the first graph and not in the second.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def load_own_shards(
    tensors: Mapping[str, Tensor], read: Read, place: Callable[[Tensor, Tensor], Tensor], devices: Sequence[str]
) -> None:
    """Give these tensors new values, in place.

    Args:
        read: reads what this process's devices hold.
        place: (host tensor, tensor like it) → the same on the devices; for what they hold whole.
        devices: names of this process's devices, under SPMD.
    """
    for name, tensor in tensors.items():
        data = tensor.detach()
        if _tiling(data).blocks == 1:
            (host,) = read(name, [whole_region(tensor.shape)])
            tensor.data = place(host.to(tensor.dtype), data)
            continue
        regions = tile_regions(torch_xla._XLAC._get_xla_sharding_spec(data), tensor.shape, device_numbers(devices))
        distinct = list(dict.fromkeys(regions))  # replicas of a tile are read once
        blocks = dict(zip(distinct, read(name, distinct), strict=True))
        padded = {region: _padded(block, _tiling(data).tile(tensor.shape)) for region, block in blocks.items()}
        shards = [padded[region].to(tensor.dtype) for region in regions]
        torch_xla._XLAC._load_local_shards(data, shards, list(devices))


def tile_regions(spec: str, shape: Sequence[int], numbers: Sequence[int]) -> list[Region]:
    """What each of some devices holds of a sharded tensor, without XLA's padding; may be empty.

    Args:
        spec: its sharding in XLA's notation.
        shape: of the whole tensor.
        numbers: of the devices in the mesh.
    """
    found, listed = _TILES.match(spec), _DEVICES.match(spec)
    assert found is not None, spec
    assert listed is not None, spec
    dims = [int(number) for number in found[1].split(",")]
    iota, permutation, names = listed.groups()
    if iota is None:
        order = np.array([int(number) for number in names.split(",")])
    else:
        order = np.arange(math.prod(dims)).reshape([int(number) for number in iota.split(",")])
        order = order.transpose([int(number) for number in permutation.split(",")]) if permutation else order
    places = {int(device): place for place, device in enumerate(order.reshape(-1))}
    tile = Tiling(tuple(dims[: len(shape)]), 1).tile(shape)
    regions = []
    for number in numbers:
        at = np.unravel_index(places[number], dims)[: len(shape)]
        offsets = tuple(min(int(a) * size, length) for a, size, length in zip(at, tile, shape, strict=True))
        sizes = tuple(min(size, length - offset) for size, length, offset in zip(tile, shape, offsets, strict=True))
        regions.append((offsets, sizes))
    return regions


def _padded(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A block in the shape that XLA has for it on each device."""
    if tuple(block.shape) == shape:
        return block
    padded = block.new_zeros(shape)
    padded[within(whole_region(block.shape))] = block
    return padded
