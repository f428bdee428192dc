"""Untrusted checkpoints: loading one runs no code, reads no other file and allocates no more than is stored."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.checkpoint_metadata import ForbiddenName, read_metadata
from pretrain_xla.storage.checked_json import parse_intact, with_checksum

from ..payload import Payload


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A checkpoint of step 1 without checksums, which an attacker can leave out."""
    store = CheckpointStore(str(tmp_path / "run"), limit=1)
    store.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}, CheckpointInfo(1, None, "", {}))
    store.close()
    marker = tmp_path / "run" / "step_00000001" / "checkpoint.json"
    marker.write_text('{"step": 1, "valid_loss": null, "data": "", "config": {}}')
    return store


def change(store: CheckpointStore, edit: Callable[[Any], object]) -> None:
    """Read the metadata as DCP does, edit it, and write it back."""
    path = Path(store.folder(1)) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def change_location(metadata: Metadata, name: str, **changes: Any) -> None:
    """Change fields of the record that says where a tensor is stored."""
    for index, location in metadata.storage_data.items():
        if index.fqn == name:
            metadata.storage_data[index] = replace(location, **changes)


def in_a_tensor_file(store: CheckpointStore, payload: Payload) -> None:
    """Put it into the pickle of tensor b's file, at the end of the data file."""
    buffer = io.BytesIO()
    torch.save(torch.tensor(7), buffer)
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for item in old.infolist():
            new.writestr(item, pickle.dumps(payload) if item.filename.endswith("data.pkl") else old.read(item))
    append(store, "b", rebuilt.getvalue())


def append(store: CheckpointStore, name: str, content: bytes) -> None:
    data = Path(store.folder(1)) / "__0_0.distcp"
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + content)
    change(store, lambda metadata: change_location(metadata, name, offset=start, length=len(content)))


def as_a_bytes_item(store: CheckpointStore, payload: Payload) -> None:
    """Put it into a bytes item, which DCP reads with an unrestricted unpickler."""
    append(store, "b", pickle.dumps(payload))
    change(store, lambda metadata: metadata.state_dict_metadata.update(b=BytesStorageMetadata()))


PAYLOADS: dict[str, Callable[[CheckpointStore, Payload], object]] = {
    "instead of the metadata": lambda s, p: (Path(s.folder(1)) / ".metadata").write_bytes(pickle.dumps(p)),
    "for the planner": lambda s, p: change(s, lambda m: setattr(m, "planner_data", p)),
    "as a path": lambda s, p: change(s, lambda m: setattr(m.storage_meta, "checkpoint_id", p)),
    "as a size": lambda s, p: change(s, lambda m: setattr(m.state_dict_metadata["a"], "size", p)),
    "as a bytes item": as_a_bytes_item,
    "in a tensor's file": in_a_tensor_file,
}


@pytest.mark.parametrize("location", PAYLOADS)
def test_a_checkpoint_runs_no_code(location: str, store: CheckpointStore, tmp_path: Path) -> None:
    PAYLOADS[location](store, Payload(tmp_path / "ran"))
    if location == "as a bytes item":
        assert list(store.load(1)) == ["a"], "it is not a tensor, and is not read"
    else:
        with pytest.raises(UserError, match=r"step_00000001 is (not loaded|damaged)") as caught:
            store.load(1)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "torch load",
        "torch hub.load",
        "torch Size.__new__",
        "torch.serialization load",
        "torch.distributed.checkpoint.metadata Metadata.__init__",
        "torch.distributed.checkpoint.metadata os.system",
        "torch.distributed.checkpoint.filesystem pickle.loads",
        "pathlib Path.mkdir",
        "pathlib os",
    ],
)
def test_other_names_are_forbidden(name: str) -> None:
    module, attribute = name.split()
    pickled = (
        pickle.PROTO
        + b"\x04"
        + b"".join(pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, attribute))
    )
    with pytest.raises(ForbiddenName, match=f"{module}.{attribute}"):
        read_metadata(io.BytesIO(pickled + pickle.STACK_GLOBAL + pickle.STOP), {})


def test_a_checkpoint_of_python_3_11_0_is_read(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 3.11.3 Python pickled a member of an enumeration by `getattr`. Nothing else may be asked for so."""
    formats: Any = dcp_metadata._MEM_FORMAT_ENCODING
    by_name = lambda member, _protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(formats, "__reduce_ex__", by_name)
    change(store, lambda metadata: None)
    assert b"getattr" in (Path(store.folder(1)) / ".metadata").read_bytes()
    assert torch.equal(store.load(1)["a"], torch.arange(6.0).reshape(2, 3))
    for owner in (b"cpathlib\nPath\n", b"cbuiltins\ngetattr\n", b"\x8c\x04text"):
        with pytest.raises(ForbiddenName, match=r"builtins\.getattr"):
            read_metadata(io.BytesIO(b"cbuiltins\ngetattr\n" + owner + b"\x8c\x05mkdir\x86R."), {})


def test_torchs_own_classes_are_not_changed() -> None:
    """A pickle may set attributes of the classes that it names: they are stand-ins made for this one pickle."""
    pickled = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}Vversion\nVchanged\nst\x86b."
    with pytest.raises((ValueError, pickle.UnpicklingError, TypeError)):
        read_metadata(io.BytesIO(pickled), {})
    assert dcp_metadata.Metadata.version is None


def nested(depth: int) -> bytes:
    """A tuple of two tuples of two tuples …, as the key of a dictionary: its hash would take 2**depth steps."""
    inner = b"".join(
        pickle.BINGET + bytes([n]) + pickle.BINGET + bytes([n]) + pickle.TUPLE2 + pickle.MEMOIZE for n in range(depth)
    )
    return pickle.EMPTY_TUPLE + pickle.MEMOIZE + inner


BOMBS = {
    "nested tuples": pickle.EMPTY_DICT
    + nested(60).replace(pickle.EMPTY_TUPLE, b"K\1\x85", 1)
    + pickle.NONE
    + pickle.SETITEM,
    "a far place in the memo": b"N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",
    "reserved memory": pickle.BYTEARRAY8 + (2**45).to_bytes(8, "little"),
    "a registered extension": pickle.EXT1 + b"\1",
    "a persistent object": b"N" + pickle.BINPERSID,
    "a long text": pickle.BINUNICODE + b"\xff\xff\xff\xff",
    "a set of bytes": pickle.EMPTY_SET,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(bomb: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError):
        read_metadata(io.BytesIO(pickle.PROTO + b"\4" + BOMBS[bomb] + pickle.STOP), {})
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


FALSE_METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "10^15 elements": (
        lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([10**9, 10**6])),
        "a is said to have 1,000,000,000,000,000 elements, and 6 are stored",
    ),
    "a chunk of 10^15": (
        lambda m: (
            setattr(m.state_dict_metadata["a"], "size", torch.Size([10**9, 10**6])),
            setattr(m.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([10**9, 10**6])),
        ),
        "a is said to have 1,000,000,000,000,000 elements, and [0-9,]+ bytes are stored",
    ),
    "more than the file": (lambda m: change_location(m, "a", length=10**16), "__0_0.distcp is cut off or not there"),
    "before the file": (lambda m: change_location(m, "a", offset=-4), "__0_0.distcp is cut off or not there"),
    "no chunk": (lambda m: m.state_dict_metadata["a"].chunks.clear(), "a is said to have 6 elements, and 0 are stored"),
    "a chunk elsewhere": (
        lambda m: setattr(m.state_dict_metadata["a"].chunks[0], "offsets", torch.Size([0, 1])),
        "a is not stored in whole",
    ),
    "not stored": (lambda m: m.storage_data.pop(MetadataIndex("a", (0, 0))), "a is not stored in whole"),
    "a file above": (
        lambda m: change_location(m, "a", relative_path="../secret"),
        "names a file elsewhere: '../secret'",
    ),
    "a file anywhere": (lambda m: change_location(m, "a", relative_path="/etc/passwd"), "names a file elsewhere"),
    "compressed": (
        lambda m: change_location(m, "a", transform_descriptors=["stream.zstd"]),
        "its files are compressed",
    ),
    "no record": (lambda m: m.state_dict_metadata.update(a=3), "no TensorStorageMetadata"),
    "no type": (lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", 3), "a tensor without a type"),
    "no size": (lambda m: setattr(m.state_dict_metadata["a"], "size", (-2, 3)), "a size that is none"),
    "a name that is none": (lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["a"]}), "no text"),
    "nothing": (lambda m: setattr(m, "storage_data", None), "no Metadata with a storage_data"),
}


@pytest.mark.parametrize("case", FALSE_METADATA)
def test_false_metadata_is_refused(case: str, store: CheckpointStore) -> None:
    edit, expected = FALSE_METADATA[case]
    change(store, edit)
    tracemalloc.start()
    with pytest.raises(UserError, match=expected) as caught:
        store.load(1)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data/0", b"\7\0\0\0", "a tensor reaches beyond what is stored of it"),
        ("byteorder", b"big", "a tensor is not stored as it is written here"),
    ],
)
def test_a_tensor_does_not_read_other_memory(name: str, content: bytes, expected: str, store: CheckpointStore) -> None:
    """Its file is long enough but holds half of it: torch would read, or byte-swap, the memory after it."""
    buffer, rebuilt = io.BytesIO(), io.BytesIO()
    torch.save(torch.tensor(7), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for item in old.infolist():
            new.writestr(item, content if item.filename.endswith(name) else old.read(item))
    append(store, "b", rebuilt.getvalue())
    with pytest.raises(UserError, match=expected):
        store.load(1)


def test_many_tensors_in_the_same_bytes(store: CheckpointStore) -> None:
    """Each alone is stored; all together are more than the file holds."""

    def repeat(metadata: Any) -> None:
        location = next(location for index, location in metadata.storage_data.items() if index.fqn == "a")
        for number in range(1000):
            metadata.state_dict_metadata[f"a{number}"] = metadata.state_dict_metadata["a"]
            metadata.storage_data[MetadataIndex(f"a{number}", (0, 0))] = location

    change(store, repeat)
    with pytest.raises(UserError, match=r"its tensors are said to have 24,\d+ bytes, and"):
        store.load(1)


def test_no_pickle_of_a_checkpoint_with_an_index_is_read(tmp_path: Path) -> None:
    """Not that in a tensor's file either, even if an attacker makes all checksums right."""
    store = CheckpointStore(str(tmp_path / "run"), limit=1)
    store.save({"b": torch.tensor(7)}, CheckpointInfo(1, None, "", {}))
    store.close()
    folder = tmp_path / "run" / "step_00000001"
    buffer, rebuilt = io.BytesIO(), io.BytesIO()
    torch.save(torch.tensor(7), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for item in old.infolist():
            pickled = pickle.dumps(Payload(tmp_path / "ran"))
            new.writestr(item, pickled if item.filename.endswith("data.pkl") else old.read(item))
    hostile = rebuilt.getvalue()
    (folder / "__0_0.distcp").write_bytes(hostile)
    (folder / ".metadata").write_bytes(pickled)
    tree = parse_intact((folder / "index.json").read_bytes())
    tree["tensors"]["b"]["blocks"][0] |= {"length": len(hostile), "checksum": zlib.crc32(hostile)}
    tree["files"]["__0_0.distcp"]["size"] = len(hostile)
    tree["files"][".metadata"] = {"size": len(pickled), "checksum": zlib.crc32(pickled)}
    content = with_checksum(tree)
    (folder / "index.json").write_bytes(content)
    marker = parse_intact((folder / "checkpoint.json").read_bytes()) | {"index": zlib.crc32(content)}
    (folder / "checkpoint.json").write_bytes(with_checksum(marker))
    assert torch.equal(store.load(1)["b"], torch.tensor(7))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"file": "../secret"}, "names a file elsewhere: '../secret'"),
        ({"file": "/etc/passwd"}, "names a file elsewhere"),
        ({"start": -1}, "a size that is none"),
        ({"length": 10**9}, "__0_0.distcp is cut off or not there"),
        ({"shape": [10**8, 10**7]}, "a is not stored in whole"),
        ({"offsets": [1, 0]}, "a is not stored in whole"),
        ({"offsets": [0]}, "offsets of other dimensions"),
    ],
)
def test_a_false_index_is_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=1)
    store.save({"a": torch.arange(6.0).reshape(2, 3)}, CheckpointInfo(1, None, "", {}))
    store.close()
    folder = tmp_path / "step_00000001"
    tree = parse_intact((folder / "index.json").read_bytes())
    tree["tensors"]["a"]["blocks"][0] |= change
    content = with_checksum(tree)
    (folder / "index.json").write_bytes(content)
    marker = parse_intact((folder / "checkpoint.json").read_bytes()) | {"index": zlib.crc32(content)}
    (folder / "checkpoint.json").write_bytes(with_checksum(marker))
    with pytest.raises(UserError, match=expected):
        store.load(1)


def test_a_written_checkpoint_is_read(store: CheckpointStore) -> None:
    change(store, lambda metadata: None)
    loaded = store.load(1)
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded["b"], torch.tensor(7))
