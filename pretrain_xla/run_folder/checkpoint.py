"""Checkpoints: folders `step_00001000` under one root, on a disk or in a bucket.

`torch.distributed.checkpoint` (DCP) writes full, unsharded tensors under plain names, so they restore onto any mesh and any
runtime. `checkpoint.json`, the marker, is written last: a folder without it is not a checkpoint. It has a CRC-32 of each
tensor, computed before writing and compared after loading, so a flipped bit is found. A thread writes from host copies; the
run pays for the copy, and for its memory until the write ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint_folders import PREFIX, CheckpointFolders, step_of
from pretrain_xla.run_folder.checkpoint_marker import (
    MARKER,
    CheckpointInfo,
    DamagedMarker,
    NewerMarker,
    read_marker,
    write_marker,
)
from pretrain_xla.run_folder.checkpoint_metadata import ForbiddenName, read_metadata, reader
from pretrain_xla.run_folder.tensor_checks import not_finite
from pretrain_xla.system_faults import disk_fault, system_fault

__all__ = ["MARKER", "PREFIX", "CheckpointInfo", "CheckpointStore", "open_checkpoint"]

# torch warns on every save, but one process writes here by design, and the storage class is not ours.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


class NotWritten(UserError):
    """A checkpoint could not be written: the disk is full, the bucket does not answer …"""


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest `limit` and the one with the best validation loss.

    Attributes:
        root: path or URL of the folder that holds them.
        written: called by the writing thread with the step of each complete checkpoint.
        unwritten: called by the writing thread with a line for each checkpoint that could not be written; only the last write
            must then succeed. None means that the next `save` raises the error.
        in_use: returns the steps that must not be removed now; they are removed after a later save, or by `prune`.
        damaged: step → what is wrong with its marker. These are not counted as checkpoints, and never removed.
    """

    def __init__(self, root: str, limit: int) -> None:
        self._folders = CheckpointFolders(root)
        self.root = self._folders.root
        self._limit = limit
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._removing = threading.RLock()  # the upload thread reads what is kept, the writing thread removes the rest
        self._pending: Future[None] | None = None
        self._infos: dict[int, CheckpointInfo] = {}  # markers never change, so each is read once
        self._writing: int | None = None
        self.damaged: dict[int, str] = {}
        self.written: Callable[[int], None] = lambda step: None
        self.unwritten: Callable[[str], None] | None = None
        self.in_use: Callable[[], set[int]] = set

    def folder(self, step: int) -> str:
        """Folder of a step's checkpoint."""
        return self._folders.url(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._folders.marked() if self._is_complete(step)]

    def _is_complete(self, step: int) -> bool:
        if step not in self._infos:
            try:
                self._infos[step] = read_marker(self._folders.files, self._folders.marker(step), step)
            except DamagedMarker as error:
                self.damaged[step] = str(error)
            except FileNotFoundError:  # removed in the meantime
                return False
            except (
                OSError,
                NewerMarker,
            ) as error:  # not damage: treated as such, the run would continue from an older one
                raise UserError(f"{self.folder(step)}/{MARKER} cannot be read ({error})") from None
        return step in self._infos

    def skipped(self, chosen: int | None) -> list[str]:
        """A line for each damaged checkpoint that is newer than the chosen one."""
        return [
            f"{self.folder(step)}/{MARKER} cannot be read ({why}), so that checkpoint is skipped"
            + ("" if chosen is None else f" for that of step {chosen}")
            for step, why in sorted(self.damaged.items())
            if chosen is None or step > chosen
        ]

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, the earliest on a tie."""
        return _best(self.losses())

    def losses(self) -> dict[int, float | None]:
        """Step → validation loss of the complete checkpoints, ascending by step; None where it was not measured."""
        return {step: self._infos[step].valid_loss for step in self.steps()}

    def kept(self, elsewhere: Mapping[int, float | None] | None = None) -> set[int]:
        """Steps of the newest `limit` checkpoints and of the best one, among those here and `elsewhere` (step → loss)."""
        with self._removing:
            losses = {**(elsewhere or {}), **self.losses()}
        best = _best(losses)
        return {*sorted(losses)[-self._limit :], *([] if best is None else [best])}

    def prune(self) -> None:
        """Remove checkpoints that are neither kept nor in use, and what interrupted writes and removals left behind."""
        with self._removing:
            complete, keep = self.steps(), self.kept() | self.in_use()
            incomplete = [step for step in self._folders.all() if step not in complete and step != self._writing]
            surplus = [step for step in complete if step not in keep]
            for step in (*surplus, *filter(self._folders.is_remainder, incomplete)):
                self._infos.pop(step, None)
                self._folders.remove(step)

    def info(self, step: int) -> CheckpointInfo:
        """Content of a step's marker.

        Raises:
            UserError: it is missing or cannot be read.
        """
        self._infos.pop(step, None)
        if not self._is_complete(step):
            why = self.damaged.get(step, "no such file")
            raise UserError(f"{self.folder(step)}/{MARKER} cannot be read ({why}): remove that folder")
        return self._infos[step]

    def load(self, step: int) -> dict[str, Tensor]:
        """All tensors of a checkpoint, unsharded, on the host.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder, checksums = self.folder(step), self.info(step).checksums
        try:
            tensors = self._read(step)
        except ForbiddenName as error:
            raise UserError(
                f"{folder} is not loaded: its .metadata asks for {error}, which is not part of a checkpoint and could run "
                "code here; the file may be malicious"
            ) from None
        except (Exception, CheckpointException) as error:
            if (lack := system_fault(error)) is not None:  # of the host, not of the checkpoint
                raise UserError(f"{folder} cannot be read: {lack}") from error
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
        """Write host tensors in the background; an error of an earlier write is raised here, unless `unwritten` is set.

        Raises:
            UserError: the earlier write failed (disk full, no permission …).
        """
        try:
            self.wait()
        except NotWritten:
            if self.unwritten is None:
                raise
        self._pending = self._writer.submit(self._write, tensors, info)

    def wait(self) -> None:
        """Wait until the last `save` is complete.

        Raises:
            UserError: the checkpoint could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.root}: older checkpoints could not be removed ({_reason(error)})") from error

    def close(self) -> None:
        """Wait for the last `save`, and end the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=True)

    def _read(self, step: int) -> dict[str, Tensor]:
        files, path = self._folders.files, self._folders.path(step)
        entries = files.ls(path, detail=True)
        sizes = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries if entry["type"] != "directory"
        }
        with files.open(f"{path}/.metadata", "rb") as file:
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
            return  # stopped right after a save: the checkpoint has this state, and rewriting would put it at risk
        if (fault := not_finite(tensors)) is not None:
            newest = self.newest()
            raise UserError(
                f"the state after step {info.step} is not saved: {fault}; lower --learning-rate, raise --warmup-steps or set "
                f"--max-grad-norm 1.0; "
                + ("there is no earlier checkpoint" if newest is None else f"the newest one is that of step {newest}")
            )
        self._writing = info.step
        try:
            self._put(tensors, info)
        except (Exception, CheckpointException) as error:
            with contextlib.suppress(Exception):  # an incomplete one is useless, and takes up the missing space
                self._folders.remove(info.step)
            raise self._not_written(info.step, error) from error
        finally:
            self._writing = None
        self.prune()
        self.written(info.step)

    def _put(self, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
        files, folders = self._folders.files, self._folders
        folders.remove(info.step)  # left behind by an interrupted write
        files.makedirs(folders.path(info.step), exist_ok=True)
        info = replace(info, checksums={name: _checksum(tensor) for name, tensor in tensors.items()})
        dcp.save(tensors, storage_writer=_writer(folders.url(info.step)), no_dist=True)
        write_marker(files, folders.marker(info.step), info)
        self.damaged.pop(info.step, None)

    def _not_written(self, step: int, error: BaseException) -> NotWritten:
        what = f"{self.root}: the checkpoint of step {step} could not be written ({_reason(error)}); earlier ones are complete"
        if self.unwritten is not None:
            self.unwritten(f"{what}: make room; the next one is tried when it is due")
        return NotWritten(f"{what}: make room and start again to continue from the newest")


def open_checkpoint(
    path: str, which: str = "newest", say: Callable[[str], None] = lambda line: None
) -> tuple[CheckpointStore, int]:
    """Find the checkpoint of a path: store and step.

    Args:
        path: a run folder, a folder of checkpoints, or one checkpoint.
        which: `newest` or `best`, if there are several.
        say: called with a line for each damaged checkpoint that is skipped, and if no validation loss was measured for `best`.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = path.rstrip("/")
    if (step := step_of(os.path.basename(path))) is not None:
        store = CheckpointStore(os.path.dirname(path) or ".", limit=1)
        if step in store.steps():
            return store, step
        if step in store.damaged:
            store.info(step)
    damaged: list[str] = []
    for root in (path, f"{path}/checkpoints"):
        store = CheckpointStore(root, limit=1)
        found = store.newest()
        lines = store.skipped(found)
        if found is None:
            damaged += lines
            continue
        if which == "best" and (best := store.best()) is not None:
            found = best
        elif which == "best":
            lines.append(f"{root}: no checkpoint has a measured validation loss: using the newest, of step {found}")
        for line in lines:
            say(line)
        return store, found
    if damaged:
        raise UserError(f"{damaged[-1]}, and there is no other: remove that folder")
    raise UserError(f"{path}: no complete checkpoint there; name a run folder, its checkpoints folder, or one step_…")


def _best(losses: Mapping[int, float | None]) -> int | None:
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _reason(error: BaseException) -> str:
    """The cause in a few words: DCP wraps it in a CheckpointException (a BaseException), with traces in its text.

    For a full disk, torch's writer reports `unexpected pos 704 vs 598`; the system's error is in the exception's cause.
    """
    if (fault := disk_fault(error)) is not None:
        return fault
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    words = str(cause).strip().splitlines()
    return words[-1][:200] if words else type(cause).__name__


def _writer(folder: str) -> Any:
    if "://" not in folder:
        return dcp.FileSystemWriter(folder, sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(folder)
