"""`checkpoint.json`, the marker that a checkpoint is complete, with its metadata.

It is written last and atomically, so that a run may be killed at any moment: on a disk under a temporary name, synced and
renamed; a put to a bucket is atomic. A folder whose marker cannot be parsed is not a checkpoint; other checkpoints stay usable.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pretrain_xla.storage.files import is_local, write_atomically

MARKER = "checkpoint.json"
VERSION = 2
"""Marker format: 1 had the last validation loss, of any step; 2 has the loss of exactly these weights, or null."""


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
    checksums: tensor name → CRC-32. seen: position in the data. tokenizer: fingerprint of the tokenizer that made the data.
    The last three are None in older checkpoints.
    """

    step: int
    valid_loss: float | None
    data: str
    config: dict[str, Any]
    version: int = VERSION
    checksums: dict[str, int] | None = None
    seen: DataPosition | None = None
    tokenizer: str | None = None


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
        DamagedMarker: it is truncated, or not a marker of this step.
        NewerMarker: it has unknown fields.
        OSError: it cannot be read.
    """
    try:
        with files.open(path, "rb") as file:
            content = json.loads(file.read())
        if isinstance(content, dict) and (unknown := content.keys() - {field.name for field in fields(CheckpointInfo)}):
            raise NewerMarker(f"a later version of pretrain_xla wrote it: {min(unknown)} is not known here")
        if isinstance(content, dict) and content.get("seen") is not None:
            content["seen"] = DataPosition(**content["seen"])
        info = CheckpointInfo(**content)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedMarker(" ".join(str(error).split())[:200]) from None
    if info.step != step or not isinstance(info.config, dict) or not isinstance(info.data, str):
        raise DamagedMarker(f"it is not of step {step}")
    if not isinstance(info.version, int):
        raise DamagedMarker("its version is not a number")
    if not isinstance(info.valid_loss, int | float | None) or not isinstance(info.checksums, dict | None):
        raise DamagedMarker("its valid_loss or its checksums have the wrong type")
    if not isinstance(info.tokenizer, str | None):
        raise DamagedMarker("its tokenizer has the wrong type")
    return info if _measured_here(info) else replace(info, valid_loss=None)


def write_marker(files: Any, path: str, info: CheckpointInfo) -> None:
    """Write a marker atomically; on a disk, the marker and the folder's entries are synced when this returns."""
    content = json.dumps(asdict(info)).encode()
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
