"""Equal blocks whose parameters are held together: one tensor for each parameter, of all layers at once.

A loop over layers reads its weights from such tensors and writes their gradients into such tensors. Held like this, they need
not be put together in each step nor taken apart again, and the optimizer makes one update for all layers: the compiler has
one to compile where it had one for each, which is most of what a deep step takes to compile.

The last layer comes first. Backward then runs through gradients from the first to the last, and only of a tensor that is
written in this order does the TPU compiler see that it need not be filled with zeros before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

ALL = "blocks.all."
"""In the name of a parameter, or of the optimizer's state for it: it holds that of all blocks."""


class StackedBlocks(nn.Module):
    """One block whose parameters are those of all.

    all: the block; not to be called as it is, only with the parameters of one layer put in their place.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        """Take the parameters out of the blocks, which then have none."""
        super().__init__()
        blocks = list(blocks)
        self.count = len(blocks)
        self.all = blocks[0]
        for name in [name for name, _ in self.all.named_parameters()]:
            column = [block.get_parameter(name).detach() for block in blocks]
            for block in blocks:
                _set_parameter(block, name, None)  # frees as it goes
            _set_parameter(self.all, name, nn.Parameter(torch.stack(column[::-1])))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        """The blocks as functions, first to last."""
        for layer in range(self.count):
            slices = {name: tensor[self.count - 1 - layer] for name, tensor in self.all.named_parameters()}
            yield partial(_call, self.all, slices)


def unstack_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that they have where blocks are not stacked, as checkpoints have them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ALL in name:
            for layer, part in enumerate(reversed(tensor.unbind())):
                # A copy, since what writes a tensor to a file may write all of the memory that it is a view of.
                found[name.replace(ALL, f"blocks.{layer}.")] = part.clone()
        else:
            found[name] = tensor
    return found


def unstacked_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name → shape of tensors as `unstack_layers` makes them."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ALL in name:
            found |= {name.replace(ALL, f"blocks.{layer}."): shape[1:] for layer in range(shape[0])}
        else:
            found[name] = shape
    return found


def is_stacked(name: str) -> bool:
    """Whether a tensor has a leading dimension over layers."""
    return ALL in name


def _call(block: nn.Module, parameters: dict[str, Tensor], *arguments: object) -> Tensor:
    output: Tensor = torch.func.functional_call(block, parameters, arguments)
    return output


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path).register_parameter(leaf, value)
