"""Applying a function to many matrices, all of one shape at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = TypeVar("Kind", bound=Hashable)


class MapMatrices(Protocol):
    """Applies a function to each of many matrices, the work split over the devices where there are several."""

    def __call__(self, function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The function of each matrix, on every device that has the matrix.

        Args:
            function: (N, R, C) → (N, R, C), of independent matrices.
            matrices: name of the parameter → matrix (R, C), or (L, R, C) for L of them.
        """


def map_stacks(function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `MapMatrices` for one device: the function of all matrices of one shape in one stack."""
    return map_stacks_of(lambda stack_NRC, _kind: function(stack_NRC), matrices, kind=lambda _name: None)


def map_stacks_of(
    function: Callable[[Tensor, Kind], Tensor], matrices: Mapping[str, Tensor], kind: Callable[[str], Kind]
) -> dict[str, Tensor]:
    """The same with a stack for each shape and `kind` of a parameter's name, which the function is passed, too."""
    stacks: dict[tuple[torch.Size, Kind], list[str]] = {}
    for name, matrix in matrices.items():
        stacks.setdefault((matrix.shape[-2:], kind(name)), []).append(name)
    results: dict[str, Tensor] = {}
    for (_, of_kind), names in stacks.items():
        layers = [matrices[name] if matrices[name].dim() == 3 else matrices[name][None] for name in names]
        stack_NRC = function(torch.cat(layers), of_kind)
        for name, part in zip(names, stack_NRC.split([len(layer) for layer in layers]), strict=True):
            results[name] = part.view(matrices[name].shape)
    return results


def map_shares(
    function: Callable[[Tensor], Tensor],
    matrices: Mapping[str, Tensor],
    index: Tensor,
    count: int,
    gather: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """A `MapMatrices` for one process a device: each takes its share of every stack. index, count: see `own_share`.

    gather: (n, R, C) of each process → (count * n, R, C).
    """
    return map_stacks(lambda stack: gather(function(own_share(stack, index, count)))[: len(stack)], matrices)


def own_share(stack_NRC: Tensor, index: Tensor, count: int) -> Tensor:
    """One process's share of a stack, padded with zeros to divide. index: of the process, int64, one element.

    The index is a tensor so that a compiled program is the same in every process.
    """
    return pad_stack(stack_NRC, count).unflatten(0, (count, -1)).index_select(0, index)[0]


def pad_stack(stack_NRC: Tensor, devices: int) -> Tensor:
    """The stack with matrices of zeros behind it, so that it divides over the devices."""
    missing = -len(stack_NRC) % devices
    return F.pad(stack_NRC, (0, 0, 0, 0, 0, missing)) if missing else stack_NRC
