"""`checkpoint.json`: what a checkpoint is, and that it is complete.

It is written last, and whole or not at all, so that a run may be killed at any moment: locally to another name, to the disk,
and renamed; a bucket's put is whole by itself. What cannot be understood (a version from before wrote it in place) makes the
folder no checkpoint, and harms no other.
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
"""Of the marker: 1 carried the last validation loss, of whatever step; 2 that of these very weights, or none."""


@dataclass(frozen=True)
class DataPosition:
    """tokens: seen in the whole run, whatever the data. position: in the order of the present data. seed, shuffle_window: of
    that order."""

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
    """What `checkpoint.json` says. step: updates made. valid_loss: measured on these very weights. None means it was not. data:
    fingerprint of the shards. checksums: of each tensor; seen: of the data; tokenizer: fingerprint of what the data was made
    with; none in checkpoints from before there were any.
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
    """What stands there is no marker; the text says why, in a few words."""


class NewerMarker(Exception):
    """A marker by a later version of this program."""


def read_marker(files: Any, path: str, step: int) -> CheckpointInfo:
    """Read the marker of a step.

    Args:
        files: its fsspec file system.
        path: the marker on it.
        step: that the folder is named by.

    Raises:
        DamagedMarker: it is cut off, or says something else than a marker of this step.
        NewerMarker: it has fields that are not known here.
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
        raise DamagedMarker(f"it is none of step {step}")
    if not isinstance(info.version, int):
        raise DamagedMarker("its version is no number")
    if not isinstance(info.valid_loss, int | float | None) or not isinstance(info.checksums, dict | None):
        raise DamagedMarker("its valid_loss or its checksums are of another kind")
    if not isinstance(info.tokenizer, str | None):
        raise DamagedMarker("its tokenizer is of another kind")
    return info if _measured_here(info) else replace(info, valid_loss=None)


def write_marker(files: Any, path: str, info: CheckpointInfo) -> None:
    """Write a marker, whole or not at all; locally it and the folder's entries are on the disk afterwards."""
    content = json.dumps(asdict(info)).encode()
    if not is_local(files):
        files.pipe_file(path, content)
        return
    folder = os.path.dirname(path)
    sync_folder(folder)  # the names of what it vouches for come first
    write_atomically(files, path, [content])
    sync_folder(folder)
    sync_folder(os.path.dirname(folder))


def sync_folder(folder: str) -> None:
    """Have the entries of a local folder on the disk, as `fsync` has a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot do it for a folder; they have no need of it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measured_here(info: CheckpointInfo) -> bool:
    """Whether the loss is of these weights. Of version 1 it is where a validation was due at that step, and only there."""
    if info.valid_loss is None or not math.isfinite(info.valid_loss):
        return False
    train = info.config.get("train")
    if info.version > 1 or not isinstance(train, dict):
        return True
    interval, last = train.get("valid_interval"), train.get("train_steps")
    return info.step == last or (isinstance(interval, int) and interval > 0 and info.step % interval == 0)
