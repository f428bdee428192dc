"""Regions of a saved state, wherever its tensors are: in a checkpoint, which is read as needed, or in memory.

A run may hold the layers of a parameter as one tensor (`model.xla.stacked`); what is saved has a tensor for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pretrain_xla.model.xla.stacked import ALL
from pretrain_xla.run_folder.checkpoint_reading import StoredTensors
from pretrain_xla.runtime.shards import Region, within


class Converted(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each put into another shape when it is asked for, and not kept.

    Args:
        stored: where they are read.
        convert: (name, tensor) → the tensor; also called with tensors on the meta device.
    """

    def __init__(self, stored: StoredTensors, convert: Callable[[str, Tensor], Tensor]) -> None:
        self._stored, self._convert = stored, convert

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return tuple(self._convert(name, torch.empty(self._stored.shape(name), device="meta")).shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._convert(name, self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # a Mapping's own reads the tensor

    def __len__(self) -> int:
        return len(self._stored)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """Shape of a saved tensor, without reading it; of one that is stacked, with its layers. None means it is not there."""
    if ALL in name:
        layers = _layers(tensors, name)
        shape = None if not layers else shape_of(tensors, layers[0])
        return None if shape is None else (len(layers), *shape)
    if name not in tensors:
        return None
    return tensors.shape(name) if isinstance(tensors, StoredTensors | Converted) else tuple(tensors[name].shape)


def read_regions(tensors: Mapping[str, Tensor], name: str, regions: Sequence[Region]) -> list[Tensor]:
    """Regions of a saved tensor; of one that is stacked, from its layers.

    Raises:
        UserError: it cannot be read; `DamagedCheckpoint` if it is damaged.
    """
    if ALL in name:
        return _stacked(tensors, name, regions)
    if isinstance(tensors, StoredTensors):
        return tensors.read(name, regions)
    tensor = tensors[name]
    return [tensor[within(region)] for region in regions]


def _stacked(tensors: Mapping[str, Tensor], name: str, regions: Sequence[Region]) -> list[Tensor]:
    found: list[Tensor | None] = [None] * len(regions)
    for row, layer in enumerate(reversed(_layers(tensors, name))):  # the last layer comes first
        here = [number for number, (at, size) in enumerate(regions) if at[0] <= row < at[0] + size[0]]
        parts = read_regions(tensors, layer, [(regions[n][0][1:], regions[n][1][1:]) for n in here])
        for number, part in zip(here, parts, strict=True):
            region, target = regions[number], found[number]
            if target is None:
                target = found[number] = torch.empty(region[1], dtype=part.dtype)
            target[row - region[0][0]] = part
    return [
        torch.empty(region[1]) if target is None else target  # a region without elements
        for target, region in zip(found, regions, strict=True)
    ]


def _layers(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """Names of the tensors that are stacked under a name, from the first layer."""
    before, after = name.split(ALL)
    names: list[str] = []
    while (one := f"{before}blocks.{len(names)}.{after}") in tensors:
        names.append(one)
    return names
