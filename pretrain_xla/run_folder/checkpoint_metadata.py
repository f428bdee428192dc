"""Reading `torch.distributed.checkpoint` (DCP) files without trusting them.

`.metadata` is a pickle, and a pickle can call any function: an attacker could run code here. So a restricted unpickler accepts
only DCP's own records, and fills placeholder classes instead of torch's. The result is validated before it becomes a
`Metadata`: files must be in the folder itself, and a tensor may not be larger than its stored bytes. Tensors are unpickled
with `weights_only=True`.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "TensorProperties",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
# Callables with plain arguments, replaced by plain types: no torch function is called while a pickle is read.
_VALUES: dict[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
}
_PATHS = {"pathlib", "pathlib._local"}  # the folder at the time of writing: not used


class ForbiddenName(Exception):
    """A pickle names something that no checkpoint needs; the text is that name."""


def read_metadata(file: IO[bytes], sizes: Mapping[str, int]) -> Metadata:
    """The tensors in a `.metadata`; other entries are left out.

    Args:
        file: the `.metadata`.
        sizes: file name → bytes, of the files in its folder.

    Raises:
        ForbiddenName: it names something that is not part of a checkpoint.
        ValueError: it is not valid, names a file outside the folder, or declares more than is stored.
    """
    root = _Unpickler(file).load()
    tensors = {
        _text(name): _tensor(entry)
        for name, entry in _field(root, "Metadata", "state_dict_metadata", dict).items()
        if not _is(entry, "BytesStorageMetadata")
    }
    storage = {_index(key): _place(value) for key, value in _field(root, "Metadata", "storage_data", dict).items()}
    _check_stored(tensors, storage, sizes)
    entries: dict[str, Any] = dict(tensors)
    return Metadata(entries, {name: (name,) for name in tensors}, storage, StorageMeta())


def reader(folder: str, metadata: Metadata) -> dcp.FileSystemReader:
    """DCP's reader of a folder (path or URL), for metadata from `read_metadata`."""
    return _RemoteReader(folder, metadata) if "://" in folder else _LocalReader(folder, metadata)


class _Read(dcp.FileSystemReader):
    metadata: Metadata

    def read_metadata(self, *_arguments: Any, **_keywords: Any) -> Metadata:
        """The validated metadata, instead of DCP's `pickle.load`."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Like DCP's own, with one read for each tensor and a check of its size."""
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in per_file.items():
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    stream.seek(place.offset)
                    tensor = narrow_tensor_by_index(
                        _stored(stream.read(place.length)), item.storage_offsets, item.lengths
                    )
                    target = planner.resolve_tensor(item).detach()
                    if target.shape != tensor.shape:
                        raise ValueError(f"{item.storage_index.fqn} is stored in another shape")
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _LocalReader(_Read):
    def __init__(self, folder: str, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata


class _RemoteReader(_Read, FsspecReader):
    def __init__(self, folder: str, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata


def _stored(content: bytes) -> Tensor:
    """A tensor as `torch.save` wrote it.

    Raises:
        ValueError: it is not a tensor, or larger than its stored bytes.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [item.file_size for item in archive.infolist() if "/data/" in item.filename]
        order = [archive.read(item) for item in archive.infolist() if item.filename.endswith("/byteorder")]
    # For another byte order, torch would swap bytes in place, even beyond the end.
    if len(parts) != 1 or parts[0] > len(content) or any(word != b"little" for word in order):
        raise ValueError("a tensor is not stored as it is written here")
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() > parts[0]:
        raise ValueError("a tensor reaches beyond what is stored of it")
    return tensor


class _Record:
    """Placeholder of an object in the pickle: its class name and its state."""

    kind = ""

    def __init__(self, *_arguments: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Accepts the names that DCP writes. Each gets a class private to this unpickler, so that a pickle cannot change others."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._classes: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        if module == "torch" and isinstance(dtype := torch.__dict__.get(name), torch.dtype):
            return dtype
        if name in _RECORDS.get(module, ()) or (module in _PATHS and name.endswith("Path")):
            return self._classes.setdefault(name, type(name, (_Record,), {"kind": name}))
        raise ForbiddenName(f"{module}.{name}")


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _field(record: object, kind: str, name: str, wanted: type) -> Any:
    state = record.state if isinstance(record, _Record) and record.kind == kind else None
    value = state.get(name) if isinstance(state, dict) else None
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"its .metadata has no {kind} with a {name}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("its .metadata names a tensor by something that is no text")
    return value


def _size(value: object) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("its .metadata has a size that is none")
    return torch.Size(value)


def _tensor(entry: object) -> TensorStorageMetadata:
    kind = "TensorStorageMetadata"
    properties = _field(entry, kind, "properties", _Record).state
    dtype = properties[0] if isinstance(properties, tuple) and properties else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError("its .metadata has a tensor without a type")
    chunks = [
        ChunkStorageMetadata(*(_size(_field(chunk, "ChunkStorageMetadata", n, tuple)) for n in ("offsets", "sizes")))
        for chunk in _field(entry, kind, "chunks", list)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(_field(entry, kind, "size", tuple)), chunks)


def _index(key: object) -> MetadataIndex:
    name = _field(key, "MetadataIndex", "fqn", str)
    assert isinstance(key, _Record)
    offset = key.state.get("offset")
    return MetadataIndex(name, None if offset is None else _size(offset))


def _place(value: object) -> _StorageInfo:
    kind = "_StorageInfo"
    path = _field(value, kind, "relative_path", str)
    offset, length = (_field(value, kind, name, int) for name in ("offset", "length"))
    assert isinstance(value, _Record)
    if value.state.get("transform_descriptors"):
        raise ValueError("its files are compressed, which ours are not")
    if path in ("", ".", "..") or "/" in path or "\\" in path:
        raise ValueError(f"its .metadata names a file elsewhere: {path!r}")
    return _StorageInfo(path, offset, length)


def _check_stored(
    tensors: Mapping[str, TensorStorageMetadata],
    storage: Mapping[MetadataIndex, _StorageInfo],
    sizes: Mapping[str, int],
) -> None:
    """Refuse tensors that are declared but not stored, before memory is allocated for them."""
    declared = 0
    for name, tensor in tensors.items():
        width = tensor.properties.dtype.itemsize
        covered = 0
        for chunk in tensor.chunks:
            place = storage.get(MetadataIndex(name, chunk.offsets))
            bounds = zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
            if place is None or not all(offset + length <= whole for offset, length, whole in bounds):
                raise ValueError(f"{name} is not stored in whole")
            if not 0 <= place.offset <= place.offset + place.length <= sizes.get(place.relative_path, -1):
                raise ValueError(f"{place.relative_path} is cut off or not there")
            elements = math.prod(chunk.sizes)
            if elements * width > place.length:
                raise ValueError(f"{name} is said to have {elements:,} elements, and {place.length:,} bytes are stored")
            covered += elements
        if covered != (elements := math.prod(tensor.size)):
            raise ValueError(f"{name} is said to have {elements:,} elements, and {covered:,} are stored")
        declared += elements * width
    if declared > (stored := sum(sizes.get(name, 0) for name in {place.relative_path for place in storage.values()})):
        raise ValueError(f"its tensors are said to have {declared:,} bytes, and {stored:,} are stored")
