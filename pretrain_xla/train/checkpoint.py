"""Checkpoints: folders `step_00001000` under one root, on a disk or in a bucket.

Tensors are written by `torch.distributed.checkpoint` as whole tensors under plain names, so they restore onto any mesh and any
runtime. `checkpoint.json` is written last: a folder without it is not a checkpoint, whatever else it holds. It carries a
CRC-32 of each tensor, made before the write and compared after a load, so a bit that a disk or a transfer flips is found.
Writing happens in a thread, from host copies; the cost to the run is the copy, and that memory while the write lasts.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain_xla.errors import UserError
from pretrain_xla.train.checkpoint_metadata import ForbiddenName, read_metadata, reader

# Of torch's own making, on every save: one process writes here by design, and the storage class is not ours.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")

MARKER = "checkpoint.json"
PREFIX = "step_"


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says. step: updates made. valid_loss: the last one measured. data: fingerprint of the shards.
    checksums: of each tensor; none in checkpoints from before there were any.
    """

    step: int
    valid_loss: float | None
    data: str
    config: dict[str, Any]
    version: int = 1
    checksums: dict[str, int] | None = None


class CheckpointStore:
    """The checkpoints of one run, newest last; keeps the newest `limit` and the one with the best validation loss.

    written: called by the writing thread with the step of each complete checkpoint. in_use: steps that must not be removed now;
    they go with a later one, or by `prune`.
    """

    def __init__(self, root: str, limit: int) -> None:
        self.root = root.rstrip("/")
        self._limit = limit
        try:
            self._files, self._path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoints_dir={root}: {error}") from None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._removing = threading.RLock()  # an upload's thread asks what is kept, the writing thread removes the rest
        self._pending: Future[None] | None = None
        self.written: Callable[[int], None] = lambda step: None
        self.in_use: Callable[[], set[int]] = set

    def folder(self, step: int) -> str:
        """Folder of the checkpoint of a step."""
        return f"{self.root}/{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        try:
            found = self._files.ls(self._path, detail=False) if self._files.exists(self._path) else []
        except OSError as error:  # a bucket that is not there, or not ours
            raise UserError(f"checkpoints_dir={self.root} cannot be listed: {error}") from None
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in found]
        steps = sorted(
            int(n.removeprefix(PREFIX)) for n in names if n.startswith(PREFIX) and n[len(PREFIX) :].isdigit()
        )
        return [step for step in steps if self._files.exists(self._marker(step))]

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; the newest of them on a tie."""
        return _best(self.losses())

    def losses(self) -> dict[int, float | None]:
        """Step → last validation loss, of the complete checkpoints, ascending."""
        return {step: self.info(step).valid_loss for step in self.steps()}

    def kept(self, elsewhere: Mapping[int, float | None] | None = None) -> set[int]:
        """Steps of the newest `limit` checkpoints and of the best one, here and `elsewhere` (as `losses`) together."""
        with self._removing:
            losses = {**(elsewhere or {}), **self.losses()}
        best = _best(losses)
        return {*sorted(losses)[-self._limit :], *([] if best is None else [best])}

    def prune(self) -> None:
        """Remove the checkpoints that are neither kept nor in use."""
        with self._removing:
            keep = self.kept() | self.in_use()
            for step in self.steps():
                if step not in keep:
                    # The marker goes first, so that a half-removed folder is never taken for a checkpoint.
                    self._files.rm(self._marker(step))
                    self._files.rm(f"{self._path}/{PREFIX}{step:08d}", recursive=True)

    def info(self, step: int) -> CheckpointInfo:
        """What the marker of a step says.

        Raises:
            UserError: the marker cannot be read.
        """
        try:
            with self._files.open(self._marker(step), "r") as file:
                return CheckpointInfo(**json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder(step)}/{MARKER} cannot be read ({error}): remove that folder") from None

    def load(self, step: int) -> dict[str, Tensor]:
        """All tensors of a checkpoint, whole, on the host.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder, checksums = self.folder(step), self.info(step).checksums
        try:
            tensors = self._read(step)
        except ForbiddenName as error:
            raise UserError(
                f"{folder} is not loaded: its .metadata asks for {error}, which is no part of a checkpoint and could run "
                "code here; whoever made it may mean harm"
            ) from None
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"{folder} is damaged ({_reason(error)}): remove that folder to continue from an older checkpoint"
            ) from error
        if checksums is not None:
            names = sorted({*checksums, *tensors})
            changed = [n for n in names if n not in tensors or _checksum(tensors[n]) != checksums.get(n)]
            if changed:
                raise UserError(
                    f"{folder} is damaged (what is stored of {changed[0]} is not what was written): remove that folder to "
                    "continue from an older checkpoint"
                )
        return tensors

    def save(self, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
        """Write host tensors in the background; a fault of an earlier write is raised here.

        Raises:
            UserError: the earlier write failed (disk full, no permission …).
        """
        self.wait()
        self._pending = self._writer.submit(self._write, tensors, info)

    def wait(self) -> None:
        """Until what was saved is complete.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"{self.root}: a checkpoint could not be written ({_reason(error)}); earlier ones are whole: "
                "make room and start again to continue from the newest"
            ) from error

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=True)

    def _marker(self, step: int) -> str:
        return f"{self._path}/{PREFIX}{step:08d}/{MARKER}"

    def _read(self, step: int) -> dict[str, Tensor]:
        path = f"{self._path}/{PREFIX}{step:08d}"
        entries = self._files.ls(path, detail=True)
        sizes = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries if entry["type"] != "directory"
        }
        with self._files.open(f"{path}/.metadata", "rb") as file:
            metadata = read_metadata(file, sizes)
        tensors: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(tensors, storage_reader=reader(self.folder(step), metadata), no_dist=True)
        return tensors

    def _write(self, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
        if info.step in self.steps():
            return  # asked to stop just after a save: what is there is this state, and rewriting would put it at risk
        folder = self.folder(info.step)
        path = f"{self._path}/{PREFIX}{info.step:08d}"
        if self._files.exists(path):
            self._files.rm(path, recursive=True)  # what an interrupted write left behind
        self._files.makedirs(path, exist_ok=True)
        info = replace(info, checksums={name: _checksum(tensor) for name, tensor in tensors.items()})
        dcp.save(tensors, storage_writer=_writer(folder), no_dist=True)
        with self._files.open(self._marker(info.step), "w") as file:
            json.dump(asdict(info), file)
        self.prune()
        self.written(info.step)


def open_checkpoint(path: str, which: str = "newest") -> tuple[CheckpointStore, int]:
    """The store and step that a person means by a run folder, a folder of checkpoints, or one checkpoint.

    Args:
        path: any of the three.
        which: `newest` or `best`, when there are several.

    Raises:
        UserError: there is no complete checkpoint there.
    """
    path = path.rstrip("/")
    name = os.path.basename(path)
    if name.startswith(PREFIX) and name[len(PREFIX) :].isdigit():
        store, step = CheckpointStore(os.path.dirname(path) or ".", limit=1), int(name[len(PREFIX) :])
        if step in store.steps():
            return store, step
    for root in (path, f"{path}/checkpoints"):
        store = CheckpointStore(root, limit=1)
        found = store.best() if which == "best" else store.newest()
        if found is None and which == "best":
            found = store.newest()
        if found is not None:
            return store, found
    raise UserError(f"{path}: no complete checkpoint there; name a run folder, its checkpoints folder, or one step_…")


def _best(losses: Mapping[int, float | None]) -> int | None:
    known = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return -min(known)[1] if known else None


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _reason(error: BaseException) -> str:
    """The cause in a few words: DCP wraps it in a CheckpointException (a BaseException), with traces in its text."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    words = str(cause).strip().splitlines()
    return words[-1][:200] if words else type(cause).__name__


def _writer(folder: str) -> Any:
    if "://" not in folder:
        return dcp.FileSystemWriter(folder, sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(folder)
