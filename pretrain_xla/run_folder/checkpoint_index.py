"""`index.json`: which tensors a checkpoint holds, where the bytes of each block are, and their checksums.

`torch.distributed.checkpoint` (DCP) has the same in `.metadata`, without checksums and as a pickle, which can run code. That
file is written too, so that DCP reads our checkpoints; we read it only in checkpoints that have no index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain_xla.storage.checked_json import parse_intact, with_checksum

INDEX = "index.json"


@dataclass(frozen=True)
class Block:
    """A block of a tensor in a file.

    offsets, shape: of the block in the tensor. file: name in the checkpoint's folder. start, length: its bytes in that file, as
    `torch.save` wrote them. checksum: CRC-32 of these bytes. None means that there is none.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int
    checksum: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint. The blocks are the whole tensor, each element once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A file of a checkpoint. checksum: CRC-32 of all of it; None for files whose blocks have their own."""

    size: int
    checksum: int | None = None


@dataclass(frozen=True)
class Index:
    """The tensors of a checkpoint, or one process's share of them, and the files that hold them. Keys are their names."""

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, File]

    def encode(self, **more: Any) -> bytes:
        """As the content of a file; `more` is added to it."""
        tensors = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tensor.shape,
                "blocks": [vars(block) for block in tensor.blocks],
            }
            for name, tensor in self.tensors.items()
        }
        return with_checksum({"tensors": tensors, "files": {n: vars(f) for n, f in self.files.items()}, **more})


def decode(content: bytes) -> tuple[Index, dict[str, Any]]:
    """The index in a file's content, and what else is in it.

    Raises:
        ValueError: it is damaged, or its blocks are not whole tensors in its files.
    """
    tree = parse_intact(content)
    try:
        tensors = {
            name: StoredTensor(
                _dtype(entry["dtype"]), _numbers(entry["shape"]), tuple(_block(block) for block in entry["blocks"])
            )
            for name, entry in tree.pop("tensors").items()
        }
        files = {plain_name(name): File(_number(f["size"]), f["checksum"]) for name, f in tree.pop("files").items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {INDEX} lacks something ({error})") from None
    return Index(tensors, files), tree


def join(shares: Sequence[Index]) -> Index:
    """The index of a whole checkpoint, from the shares of all processes.

    Raises:
        ValueError: a tensor is not whole.
    """
    tensors: dict[str, StoredTensor] = {}
    for share in shares:
        for name, tensor in share.tensors.items():
            had = tensors.get(name)
            if had is not None and (had.dtype, had.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"two processes wrote different tensors as {name}")
            blocks = (*(had.blocks if had is not None else ()), *tensor.blocks)
            tensors[name] = StoredTensor(tensor.dtype, tensor.shape, blocks)
    files = {name: file for share in shares for name, file in share.files.items()}
    index = Index(tensors, files)
    check(index, {name: file.size for name, file in files.items()})
    return index


def check(index: Index, sizes: Mapping[str, int]) -> None:
    """Refuse tensors that are declared but not stored, before memory is allocated for them.

    Args:
        index: of a whole checkpoint.
        sizes: file name → bytes of the files that are there.

    Raises:
        ValueError: a file is missing or of another size, or the blocks of a tensor are not the whole of it.
    """
    for name, file in index.files.items():
        if sizes.get(name, -1) != file.size:
            raise ValueError(f"{name} is cut off or not there")
    declared = 0
    for name, tensor in index.tensors.items():
        for block in tensor.blocks:
            bounds = zip(block.offsets, block.shape, tensor.shape, strict=True)
            if not all(offset + length <= size for offset, length, size in bounds):
                raise ValueError(f"{name} is not stored in whole")
            if not block.start + block.length <= sizes.get(block.file, -1):
                raise ValueError(f"{block.file} is cut off or not there")
            if (elements := math.prod(block.shape)) * tensor.dtype.itemsize > block.length:
                raise ValueError(f"{name} is said to have {elements:,} elements, and {block.length:,} bytes are stored")
        stored = sum(math.prod(block.shape) for block in tensor.blocks)
        if stored != (elements := math.prod(tensor.shape)):
            raise ValueError(f"{name} is said to have {elements:,} elements, and {stored:,} are stored")
        if _overlap(tensor.blocks):
            raise ValueError(f"{name} is not stored in whole")
        declared += tensor.nbytes
    used = {block.file for tensor in index.tensors.values() for block in tensor.blocks}
    if declared > (there := sum(sizes.get(name, 0) for name in used)):
        raise ValueError(f"its tensors are said to have {declared:,} bytes, and {there:,} are stored")


def _overlap(blocks: Sequence[Block]) -> bool:
    """Whether two blocks of a tensor have an element in common."""
    filled = [block for block in blocks if 0 not in block.shape]
    if len(filled) < 2:
        return False
    if not filled[0].shape:
        return True  # the only element, twice
    starts = np.array([block.offsets for block in filled])
    ends = starts + np.array([block.shape for block in filled])
    for number in range(1, len(filled)):
        if ((starts[:number] < ends[number]) & (starts[number] < ends[:number])).all(axis=1).any():
            return True
    return False


def _block(entry: Any) -> Block:
    offsets, shape = _numbers(entry["offsets"]), _numbers(entry["shape"])
    if len(offsets) != len(shape):
        raise ValueError("a block has offsets of other dimensions")
    numbers = (_number(entry[key]) for key in ("start", "length", "checksum"))
    return Block(offsets, shape, plain_name(entry["file"]), *numbers)


def _dtype(name: object) -> torch.dtype:
    found = torch.__dict__.get(name) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError("its index has a tensor without a type")
    return found


def _numbers(value: Iterable[object]) -> tuple[int, ...]:
    return tuple(_number(number) for number in value)


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("its index has a size that is none")
    return value


def plain_name(name: object) -> str:
    """The name of a file in the checkpoint's own folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"it names a file elsewhere: {name!r}")
    return name
