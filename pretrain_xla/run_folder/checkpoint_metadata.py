"""`.metadata` of `torch.distributed.checkpoint` (DCP): writing it, and reading a stranger's.

It is a pickle, and a pickle can call any function: an attacker could run code here, or fill the memory. So a restricted
unpickler accepts only DCP's own records, fills placeholder classes instead of torch's, and knows only the operations that such
a file needs. The result is validated as an index is: files must be in the folder itself, and a tensor may not be larger than
its stored bytes. Only checkpoints from before `index.json` are read in this way.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain_xla.run_folder.checkpoint_index import Block, Index, StoredTensor, check, plain_name

METADATA = ".metadata"

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
_PATHS = {"pathlib", "pathlib._local"}  # the folder at the time of writing: not used
# What a pickle of such records consists of. Left out are those that call more than a class, and those that reserve memory by a
# number in the file.
_OPERATIONS = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE EMPTY_DICT
EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD""".split()


class ForbiddenName(Exception):
    """A pickle names something that no checkpoint needs; the text is that name."""


def write_metadata(index: Index) -> bytes:
    """The content of `.metadata` for an index."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.shape)) for block in tensor.blocks]
        properties = TensorProperties(dtype=tensor.dtype)
        tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, block in enumerate(tensor.blocks):
            key = MetadataIndex(name, torch.Size(block.offsets), number)
            storage[key] = _StorageInfo(block.file, block.start, block.length)
    paths: Any = {name: (name,) for name in tensors}
    return pickle.dumps(Metadata(tensors, paths, storage, StorageMeta(), version=CURRENT_DCP_VERSION))


def read_metadata(file: IO[bytes], sizes: Mapping[str, int]) -> Index:
    """The tensors in a `.metadata`; other entries are left out.

    Args:
        file: the `.metadata`.
        sizes: file name → bytes, of the files in its folder.

    Raises:
        ForbiddenName: it names something that is not part of a checkpoint.
        ValueError: it is not valid, names a file outside the folder, or declares more than is stored.
    """
    try:
        root = _Unpickler(io.BytesIO(file.read())).load()
    except (ForbiddenName, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"its {METADATA} is not one that was written here: {error}") from None
    storage = {_index(key): _place(value) for key, value in _field(root, "Metadata", "storage_data", dict).items()}
    tensors = {
        _text(name): _tensor(name, entry, storage)
        for name, entry in _field(root, "Metadata", "state_dict_metadata", dict).items()
        if not _is(entry, "BytesStorageMetadata")
    }
    index = Index(tensors, {})
    check(index, sizes)
    return index


class _Record:
    """Placeholder of an object in the pickle: its class name and its state."""

    kind = ""

    def __init__(self, *_arguments: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Value:
    """Placeholder of a callable with one plain argument: calling it gives that argument, and no torch function is called."""

    def __new__(cls, value: Any = ()) -> Any:
        if type(value) not in (tuple, str, int):
            raise ValueError(f"its {METADATA} has a value that is none")
        return value


class _Member:
    """Placeholder of `getattr`, by which Python 3.11.0 to 3.11.3 name a member of an enumeration; here, a memory format."""

    def __new__(cls, owner: object, name: object) -> Any:
        if not (isinstance(owner, type) and issubclass(owner, _Value) and isinstance(name, str)):
            raise ForbiddenName("builtins.getattr")
        return name


_VALUES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}

_Base: Any = pickle._Unpickler
"""Python's own, in Python: the one in C reserves memory for any number that a file names."""


class _Unpickler(_Base):
    """Accepts the names that DCP writes. Each gets a class private to this unpickler, so that a pickle cannot change others."""

    dispatch = {  # noqa: RUF012
        code[0]: _Base.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPERATIONS)
    }

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := torch.__dict__.get(name), torch.dtype):
            return dtype
        if (module, name) in _VALUES:
            return self._classes.setdefault(name, type(name, (_Value,), {}))
        if (module, name) == ("builtins", "getattr"):
            return self._classes.setdefault(name, type(name, (_Member,), {}))
        if name in _RECORDS.get(module, ()) or (module in _PATHS and name.endswith("Path")):
            return self._classes.setdefault(name, type(name, (_Record,), {"kind": name}))
        raise ForbiddenName(f"{module}.{name}")

    def _flat_tuple(self, load: Callable[[Any], None]) -> None:
        """Make a tuple. One in another in another is refused: a few bytes could nest them so that a hash takes for ever."""
        load(self)
        made = self.stack[-1]
        if any(type(part) is tuple and any(type(inner) is tuple for inner in part) for part in made):
            raise ValueError(f"its {METADATA} nests tuples")

    for _name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = functools.partial(lambda self, load: self._flat_tuple(load), load=dispatch[_code])
    del _name, _code


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _field(record: object, kind: str, name: str, wanted: type) -> Any:
    state = record.state if isinstance(record, _Record) and record.kind == kind else None
    value = state.get(name) if isinstance(state, dict) else None
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"its {METADATA} has no {kind} with a {name}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its {METADATA} names a tensor by something that is no text")
    return value


def _size(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise ValueError(f"its {METADATA} has a size that is none")
    return value


_Place = tuple[str, int, int]


def _tensor(name: str, entry: object, storage: Mapping[tuple[str, Any], _Place]) -> StoredTensor:
    kind = "TensorStorageMetadata"
    properties = _field(entry, kind, "properties", _Record).state
    dtype = properties[0] if isinstance(properties, tuple) and properties else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"its {METADATA} has a tensor without a type")
    shape, blocks = _size(_field(entry, kind, "size", tuple)), []
    for chunk in _field(entry, kind, "chunks", list):
        offsets, sizes = (_size(_field(chunk, "ChunkStorageMetadata", part, tuple)) for part in ("offsets", "sizes"))
        place = storage.get((name, offsets))
        if place is None or not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"{name} is not stored in whole")
        blocks.append(Block(offsets, sizes, *place))
    return StoredTensor(dtype, shape, tuple(blocks))


def _index(key: object) -> tuple[str, tuple[int, ...] | None]:
    name = _field(key, "MetadataIndex", "fqn", str)
    assert isinstance(key, _Record)
    offset = key.state.get("offset")
    return name, None if offset is None else _size(offset)


def _place(value: object) -> _Place:
    kind = "_StorageInfo"
    path = _field(value, kind, "relative_path", str)
    offset, length = (_field(value, kind, name, int) for name in ("offset", "length"))
    assert isinstance(value, _Record)
    if value.state.get("transform_descriptors"):
        raise ValueError("its files are compressed, which ours are not")
    if not (0 <= offset < 2**62 and 0 <= length < 2**62):
        raise ValueError(f"{path} is cut off or not there")
    return plain_name(path), offset, length
