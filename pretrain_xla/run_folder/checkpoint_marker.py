"""`checkpoint.json`, the marker that a checkpoint is complete, with its metadata.

It is written last and atomically, so that a run may be killed at any moment: on a disk under a temporary name, synced and
renamed; a put to a bucket is atomic. It carries a checksum of itself and that of `index.json`, which has those of the tensors:
of a checkpoint, no byte can change unnoticed. A folder whose marker is damaged is not a checkpoint; others stay usable.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pretrain_xla.storage.checked_json import CHECKSUM, parse_intact, parse_json_object, with_checksum
from pretrain_xla.storage.files import is_local, write_atomically
from pretrain_xla.storage.remote import call

MARKER = "checkpoint.json"
VERSION = 3
"""Marker format: 1 had the last validation loss, of any step; 2 has the loss of exactly these weights, or null; 3 has checksums
of the marker and of the index."""


@dataclass(frozen=True)
class DataPosition:
    """How far a run is in its data; key `seen` of the marker.

    tokens: trained on in the whole run, over all datasets. position: in the order of the current dataset, in sequences.
    seed, shuffle_window: of that order.
    """

    tokens: int
    position: int
    seed: int
    shuffle_window: int

    def __post_init__(self) -> None:
        for key, number in vars(self).items():
            if type(number) is not int or not (key == "shuffle_window") <= number < 2**62:
                raise ValueError(f"{key} is {number!r}")


@dataclass(frozen=True)
class CheckpointInfo:
    """Content of `checkpoint.json`.

    step: updates so far. valid_loss: of exactly these weights; None means not measured. data: fingerprint of the shards.
    checksums: tensor name → CRC-32 of its values, only in version 2. seen: position in the data. tokenizer: fingerprint of the
    tokenizer that made the data. index: CRC-32 of `index.json`. code: versions of the code that made it. What older
    checkpoints lack is None.
    """

    step: int
    valid_loss: float | None
    data: str
    config: dict[str, Any]
    version: int = VERSION
    checksums: dict[str, int] | None = None
    seen: DataPosition | None = None
    tokenizer: str | None = None
    index: int | None = None
    code: str | None = None


class DamagedMarker(Exception):
    """The file is not a valid marker; the text says why, in a few words."""


class NewerMarker(Exception):
    """A marker written by a later version of this package."""


def read_marker(files: Any, path: str, step: int) -> CheckpointInfo:
    """Read the marker of a step.

    Args:
        files: its fsspec file system.
        path: path of the marker on it.
        step: step in the folder's name.

    Raises:
        DamagedMarker: it was truncated or changed, or is not a marker of this step.
        NewerMarker: a later version of this package wrote it.
        OSError: it cannot be read; `UserError` in a bucket.
    """
    content = call(files, "cat_file", path)
    try:
        info = _parse(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedMarker(" ".join(str(error).split())[:200]) from None
    if info.step != step:
        raise DamagedMarker(f"it is of step {info.step}, and its folder is named after step {step}")
    return info if _measured_here(info) else replace(info, valid_loss=None)


def _parse(content: bytes) -> CheckpointInfo:
    """The content of a marker.

    Raises:
        ValueError, TypeError: it is damaged.
        NewerMarker: a later version of this package wrote it.
    """
    tree = parse_json_object(content)
    if CHECKSUM in tree:
        tree = parse_intact(content)
        version = tree.get("version")
        unknown = tree.keys() - {field.name for field in fields(CheckpointInfo)}
        if unknown or type(version) is not int or version > VERSION:
            what = f"{min(unknown)} is not known here" if unknown else f"its version is {version!r}"
            raise NewerMarker(f"a later version of pretrain_xla wrote it: {what}")
        if type(tree.get("index")) is not int:
            raise ValueError("the checksum of its index is missing")
    else:
        tree = _old(tree)
    if tree.get("seen") is not None:
        tree["seen"] = DataPosition(**tree["seen"])
    info = CheckpointInfo(**tree)
    for name, wanted in _TYPES.items():
        if isinstance(value := getattr(info, name), bool) or not isinstance(value, wanted):
            raise ValueError(f"its {name} has the wrong type")
    return info


_TYPES: dict[str, Any] = {
    "step": int,
    "valid_loss": int | float | None,
    "data": str,
    "config": dict,
    "version": int,
    "checksums": dict | None,
    "tokenizer": str | None,
    "index": int | None,
    "code": str | None,
}


def _old(tree: dict[str, Any]) -> dict[str, Any]:
    """A marker from before checksums; the first had no version."""
    tree.setdefault("version", 2 if "checksums" in tree else 1)
    if type(tree["version"]) is not int or tree["version"] > 2 or tree.keys() & {"index", "code"}:
        raise ValueError("its own checksum is missing")
    return tree


def write_marker(files: Any, path: str, info: CheckpointInfo) -> None:
    """Write a marker atomically; on a disk, the marker and the folder's entries are synced when this returns."""
    content = with_checksum({name: value for name, value in asdict(info).items() if name != "checksums"})
    if not is_local(files):
        files.pipe_file(path, content)
        return
    folder = os.path.dirname(path)
    sync_folder(folder)  # the entries of the tensors must be on the disk before the marker
    write_atomically(files, path, [content])
    sync_folder(folder)
    sync_folder(os.path.dirname(folder))


def sync_folder(folder: str) -> None:
    """`fsync` of a local folder: its entries are on the disk afterwards."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot sync a folder, and do not need it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measured_here(info: CheckpointInfo) -> bool:
    """Whether the loss is of these weights. For version 1: only if a validation was due at that step."""
    if info.valid_loss is None or not math.isfinite(info.valid_loss):
        return False
    train = info.config.get("train")
    if info.version > 1 or not isinstance(train, dict):
        return True
    interval, last = train.get("valid_interval"), train.get("train_steps")
    return info.step == last or (isinstance(interval, int) and interval > 0 and info.step % interval == 0)
