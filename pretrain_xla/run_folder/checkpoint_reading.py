"""Reading tensors of a checkpoint, one at a time, each checked while it is read.

The values are taken from the files as bytes. Only in checkpoints from before `index.json` they are unpickled, with
`weights_only=True`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint_index import INDEX, Block, Index, StoredTensor, check, decode
from pretrain_xla.run_folder.checkpoint_marker import CheckpointInfo
from pretrain_xla.run_folder.checkpoint_metadata import METADATA, ForbiddenName, read_metadata
from pretrain_xla.runtime.shards import Region, overlap, relative, within
from pretrain_xla.system_faults import system_fault

# What reading damaged bytes raises, here and in the libraries. Errors of a network or of permissions are not among them: taken
# for damage, they would make a run continue from an older checkpoint.
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    EOFError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written. what: which one, and why; the message has also what to do."""

    def __init__(self, what: str, fix: str = "remove that folder to continue from an older checkpoint") -> None:
        super().__init__(f"{what}: {fix}")
        self.what = what


@contextlib.contextmanager
def reading(folder: str) -> Iterator[None]:
    """Raise an error while a checkpoint is read as a `UserError`.

    Raises:
        DamagedCheckpoint: it is damaged.
        UserError: it may run code, or the host cannot read it now.
    """
    try:
        yield
    except UserError:
        raise
    except ForbiddenName as error:
        raise UserError(
            f"{folder} is not loaded: its .metadata asks for {error}, which is not part of a checkpoint and could run "
            "code here; the file may be malicious"
        ) from None
    except Exception as error:
        if (lack := system_fault(error)) is not None:  # of the host, not of the checkpoint
            raise UserError(f"{folder} cannot be read: {lack}") from error
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno == errno.EIO):
            raise DamagedCheckpoint(f"{folder} is damaged ({text})") from error
        raise UserError(f"{folder} cannot be read: {text}") from error


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one checkpoint; each access reads one, whole and unsharded, onto the host.

    Args:
        files: fsspec file system of the checkpoint.
        path: its folder on it.
        info: content of its marker.
        where: its folder, for messages.

    Raises:
        UserError: it cannot be read; `DamagedCheckpoint` if it is damaged. So does every access.
    """

    def __init__(self, files: Any, path: str, info: CheckpointInfo, where: str) -> None:
        self._files, self._path, self._where = files, path, where
        self._opened: tuple[str, Any] | None = None
        with reading(where):
            self._find(info)

    def _find(self, info: CheckpointInfo) -> None:
        files, path = self._files, self._path
        entries = files.ls(path, detail=True)
        sizes = {e["name"].rstrip("/").rsplit("/", 1)[-1]: e["size"] or 0 for e in entries if e["type"] != "directory"}
        self._checksums = info.checksums
        if info.index is None:
            with files.open(f"{path}/{METADATA}", "rb") as file:
                self._index = read_metadata(file, sizes)
            if info.checksums is not None and (differ := info.checksums.keys() ^ self._index.tensors.keys()):
                raise ValueError(f"what is stored of {min(differ)} is not what was written")
            return
        self._index = self._read_index(info.index)
        check(self._index, sizes)
        for name, stored in self._index.files.items():
            if stored.checksum is not None and zlib.crc32(self._read(name)) != stored.checksum:
                raise ValueError(f"{name} is not what was written")

    def __getitem__(self, name: str) -> Tensor:
        stored = self._index.tensors[name]
        with reading(self._where):
            return self._tensor(name, stored)

    def _tensor(self, name: str, stored: StoredTensor) -> Tensor:
        if len(stored.blocks) == 1:
            target = self._block(name, stored, stored.blocks[0])
        else:
            target = torch.empty(stored.shape, dtype=stored.dtype)
            for block in stored.blocks:
                part = tuple(slice(start, start + size) for start, size in zip(block.offsets, block.shape, strict=True))
                target[part] = self._block(name, stored, block)
        if self._checksums is not None and values_checksum(target) != self._checksums[name]:
            raise ValueError(f"what is stored of {name} is not what was written")
        return target

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return self._index.tensors[name].shape

    def read(self, name: str, regions: Sequence[Region]) -> list[Tensor]:
        """Regions of a tensor. Only stored blocks that overlap one are read, each once and whole, for its checksum.

        Raises:
            UserError: it cannot be read; `DamagedCheckpoint` if it is damaged.
        """
        stored = self._index.tensors[name]
        with reading(self._where):
            if self._checksums is not None:  # they are of whole tensors
                tensor = self._tensor(name, stored)
                return [tensor[within(region)] for region in regions]
            return self._regions(name, stored, regions)

    def _regions(self, name: str, stored: StoredTensor, regions: Sequence[Region]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(regions)
        for block in stored.blocks:
            own = block.offsets, block.shape
            common = [overlap(own, region) for region in regions]
            if not any(common):
                continue
            values = self._block(name, stored, block)
            for number, (region, both) in enumerate(zip(regions, common, strict=True)):
                if both is None:
                    continue
                if both == region == own:
                    found[number] = values
                    continue
                target = found[number]
                if target is None:
                    target = found[number] = torch.empty(region[1], dtype=stored.dtype)
                target[relative(both, region)] = values[relative(both, own)]
        return [
            torch.empty(region[1], dtype=stored.dtype) if target is None else target  # a region without elements
            for target, region in zip(found, regions, strict=True)
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors  # a Mapping's own reads the tensor

    def __len__(self) -> int:
        return len(self._index.tensors)

    def bytes_of(self, prefix: str = "") -> int:
        """Bytes of the tensors whose names begin with `prefix`."""
        return sum(stored.nbytes for name, stored in self._index.tensors.items() if name.startswith(prefix))

    def verify(self, index: int = 0, count: int = 1) -> None:
        """Read every `count`-th block, from number `index` on, and check it: several hosts can share the work.

        Raises:
            UserError: it cannot be read; `DamagedCheckpoint` if it is damaged.
        """
        blocks = [(name, stored, block) for name, stored in self._index.tensors.items() for block in stored.blocks]
        for name, stored, block in blocks[index::count]:
            with reading(self._where):
                if self._checksums is None:
                    self._block(name, stored, block)
                else:  # they are of whole tensors
                    self._tensor(name, stored)

    def close(self) -> None:
        """Close the file that was read last."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _block(self, name: str, stored: StoredTensor, block: Block) -> Tensor:
        content = bytearray(block.length)
        file = self._file(block.file)
        file.seek(block.start)
        if file.readinto(content) != block.length:
            raise ValueError(f"{block.file} is cut off or not there")
        if block.checksum is None:
            values = unpickled(content)
        elif zlib.crc32(content) != block.checksum:
            raise ValueError(f"what is stored of {name} is not what was written")
        else:
            values = unpacked(content, stored.dtype, block.shape)
        if values.shape != block.shape or values.dtype != stored.dtype:
            raise ValueError(f"{name} is stored in another shape or type")
        return values

    def _file(self, name: str) -> Any:
        """The file, open; opening one in a bucket is a request of its own."""
        if self._opened is None or self._opened[0] != name:
            self.close()
            self._opened = name, self._files.open(f"{self._path}/{name}", "rb")
        return self._opened[1]

    def _read_index(self, checksum: int) -> Index:
        content = self._read(INDEX)
        if zlib.crc32(content) != checksum:
            raise ValueError(f"{INDEX} is not what was written")
        return decode(content)[0]

    def _read(self, name: str) -> bytes:
        with self._files.open(f"{self._path}/{name}", "rb") as file:
            content: bytes = file.read()
        return content


def unpacked(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The values in what `torch.save` wrote for a contiguous tensor, without reading its pickle; a view of `content`.

    Raises:
        ValueError: it is not such a tensor.
    """
    _, start, size = _archive(content)
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor is stored in another size")
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8, count=size, offset=start).view(dtype).reshape(shape)


def unpickled(content: bytes | bytearray) -> Tensor:
    """A tensor as `torch.save` wrote it.

    Raises:
        ValueError: it is not a tensor, or larger than its stored bytes.
    """
    order, _, size = _archive(content)
    if order != b"little":  # torch would swap bytes in place, even beyond the end
        raise ValueError("a tensor is not stored as it is written here")
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() > size:
        raise ValueError("a tensor reaches beyond what is stored of it")
    return tensor


def values_checksum(tensor: Tensor) -> int:
    """CRC-32 of a host tensor's values."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _archive(content: bytes | bytearray) -> tuple[bytes, int, int]:
    """Of the archive that `torch.save` writes: its byte order, and where its values begin and how many bytes they are."""
    with zipfile.ZipFile(_View(content)) as archive:
        items = archive.infolist()
        if any(item.compress_type != zipfile.ZIP_STORED for item in items) or len(items) > MOST_ITEMS:
            raise ValueError("a tensor is not stored as it is written here")
        if sum(item.file_size for item in items) > len(content):
            raise ValueError("a tensor is said to be larger than what is stored of it")
        orders = [archive.read(item) for item in items if item.filename.endswith("/byteorder")]
        parts = [item for item in items if "/data/" in item.filename]
    if len(parts) != 1 or len(orders) > 1:
        raise ValueError("a tensor is not stored as it is written here")
    name, extra = struct.unpack_from("<HH", content, parts[0].header_offset + 26)  # of the local header, 30 bytes long
    start, size = parts[0].header_offset + 30 + name + extra, parts[0].file_size
    if start + size > len(content):
        raise ValueError("a tensor reaches beyond what is stored of it")
    return orders[0] if orders else b"little", start, size


MOST_ITEMS = 16
"""Items of such an archive: torch 2.9 writes six."""


class _View(io.RawIOBase):
    """Bytes as a file, without a copy of them."""

    def __init__(self, content: bytes | bytearray) -> None:
        self._content, self._at = memoryview(content), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._content)}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._content[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
