"""Checkpoints: folders `step_00001000` under one root, on a disk or in a bucket.

Each process writes its share of the state in the format of `torch.distributed.checkpoint` (DCP), and tensors are stored under
plain names as blocks of the whole, so they restore onto any mesh, any runtime and any number of hosts. `index.json` has a
checksum of each block, and `checkpoint.json`, the marker, that of the index. The marker is written last: a folder without it is
not a checkpoint. A thread writes from host copies; the run pays for the copy, and for its memory until the write ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pretrain_xla import __version__
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.background import PATIENCE, Background, Hanging
from pretrain_xla.run_folder.checkpoint_folders import PREFIX, CheckpointFolders
from pretrain_xla.run_folder.checkpoint_marker import (
    MARKER,
    CheckpointInfo,
    DamagedMarker,
    NewerMarker,
    read_marker,
    sync_folder,
    write_marker,
)
from pretrain_xla.run_folder.checkpoint_reading import DamagedCheckpoint, StoredTensors
from pretrain_xla.run_folder.checkpoint_writing import (
    collect_parts,
    remove_parts,
    remove_share,
    taken_from,
    write_index,
    write_part,
    write_shards,
)
from pretrain_xla.run_folder.tensor_checks import not_finite
from pretrain_xla.runtime.shards import Shard, whole
from pretrain_xla.storage.files import is_local
from pretrain_xla.system_faults import disk_fault

__all__ = ["MARKER", "PREFIX", "CheckpointInfo", "CheckpointStore", "DamagedCheckpoint"]

RETRY = 60.0
"""Seconds after a failed write until another is tried."""


LAST_PATIENCE = 120.0
"""Seconds that the last checkpoint of a run waits for one before it that hangs: by then a bucket may answer again."""


class NotWritten(UserError):
    """A checkpoint could not be written: the disk is full, the bucket does not answer …"""


class UnusableState(UserError):
    """A state that must not be saved."""


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest `limit`, the one with the best validation loss, and every K-th.

    Args:
        root: path or URL of the folder that holds them.
        limit: number of newest ones to keep.
        keep_interval: those of steps that are multiples of it are kept, too. None means none.

    Attributes:
        root: path or URL of the folder that holds them.
        written: called by the writing thread with the step of each complete checkpoint.
        completing: called by the writing thread of the main process just before a checkpoint is complete.
        unwritten: called with a line for each checkpoint that could not be written, by the thread that writes it; only the
            last write must then succeed. None means that the next `save` raises the error.
        in_use: returns the steps that must not be removed now; they are removed after a later save, or by `prune`.
        damaged: step → what is wrong with it. These are not counted as checkpoints, and never removed.
    """

    def __init__(self, root: str, limit: int, keep_interval: int | None = None) -> None:
        self._folders = CheckpointFolders(root)
        self.root = self._folders.root
        self._limit, self._keep_interval = limit, keep_interval
        self._process, self._processes = 0, 1
        self._background = Background("checkpoint", PATIENCE)
        self._removing = threading.RLock()  # the upload thread reads what is kept, the writing thread removes the rest
        self._infos: dict[int, CheckpointInfo] = {}  # markers never change, so each is read once
        self._writing: int | None = None
        self._saved: int | None = None  # step of the last write that succeeded: all processes know it alike
        self._failed: tuple[NotWritten, float] | None = None  # the last write's error, and when
        self._told_hanging = False
        self.damaged: dict[int, str] = {}
        self.written: Callable[[int], None] = lambda step: None
        self.completing: Callable[[], None] = lambda: None
        self.unwritten: Callable[[str], None] | None = None
        self.in_use: Callable[[], set[int]] = set

    def write_with_others(self, process: int, processes: int) -> None:
        """Write as one of several processes, each its share. Number 0 is the main one, which completes and removes."""
        self._process, self._processes = process, processes

    def folder(self, step: int) -> str:
        """Folder of a step's checkpoint."""
        return self._folders.url(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._folders.marked() if self._is_complete(step)]

    def condemn(self, step: int, what: str) -> None:
        """Count a checkpoint as damaged from now on, because of what reading its tensors has shown."""
        self._infos.pop(step, None)
        self.damaged[step] = what

    def _is_complete(self, step: int) -> bool:
        if step in self.damaged:
            return False
        if step not in self._infos:
            try:
                self._infos[step] = read_marker(self._folders.files, self._folders.marker(step), step)
            except DamagedMarker as error:
                self.damaged[step] = f"{self.folder(step)}/{MARKER} cannot be read ({error})"
            except FileNotFoundError:  # removed in the meantime
                return False
            except (OSError, NewerMarker) as error:
                # Not damage: treated as such, the run would continue from an older one.
                raise UserError(f"{self.folder(step)}/{MARKER} cannot be read ({error})") from None
        return step in self._infos

    def skipped(self, chosen: int | None) -> list[str]:
        """A line for each damaged checkpoint that is newer than the chosen one."""
        return [
            f"{what}, so that checkpoint is skipped" + ("" if chosen is None else f" for that of step {chosen}")
            for step, what in sorted(self.damaged.items())
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
        """Steps of the newest `limit` checkpoints, of the best one and of every K-th, among those here and `elsewhere`.

        elsewhere: step → validation loss.
        """
        with self._removing:
            losses = {**(elsewhere or {}), **self.losses()}
        best, every = _best(losses), self._keep_interval
        marked = [step for step in losses if every is not None and step % every == 0]
        return {*sorted(losses)[-self._limit :], *marked, *([] if best is None else [best])}

    def prune(self, before: int | None = None) -> None:
        """Remove checkpoints that are neither kept nor in use, and remainders; see `remove_remainders`."""
        with self._removing:
            complete, keep = self.steps(), self.kept() | self.in_use()
            for step in complete:
                if step not in keep:
                    self._infos.pop(step, None)
                    self._folders.remove(step)
        self.remove_remainders(before)

    def remove_remainders(self, before: int | None = None) -> None:
        """Remove what interrupted writes and removals left behind.

        before: only of earlier steps; other processes may be writing a later one. None means of all.
        """
        with self._removing:
            for step in self._folders.all():
                if (before is None or step < before) and step != self._writing and self._folders.is_remainder(step):
                    self._folders.remove(step)

    def info(self, step: int) -> CheckpointInfo:
        """Content of a step's marker.

        Raises:
            UserError: it cannot be read; `DamagedCheckpoint` if it is missing or damaged.
        """
        self._infos.pop(step, None)
        if not self._is_complete(step):
            what = self.damaged.get(step, f"{self.folder(step)}/{MARKER} cannot be read (no such file)")
            raise DamagedCheckpoint(what, "remove that folder")
        return self._infos[step]

    def stored(self, step: int) -> StoredTensors:
        """The tensors of a checkpoint, which are read one by one when they are asked for.

        Raises:
            UserError: it cannot be read; `DamagedCheckpoint` if it is damaged. So does asking for a tensor.
        """
        return StoredTensors(self._folders.files, self._folders.path(step), self.info(step), self.folder(step))

    def load(self, step: int, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a checkpoint whose names begin with `prefix`, whole, on the host; the others are not read.

        Raises:
            UserError: it cannot be read; `DamagedCheckpoint` if it is damaged.
        """
        with contextlib.closing(self.stored(step)) as stored:
            return {name: stored[name] for name in stored if name.startswith(prefix)}

    def is_ready(self, patience: float = 0.0) -> bool:
        """Wait for the write before, and say whether another can begin: not if that one hangs. An error of it is raised here,
        unless `unwritten` is set.

        Args:
            patience: seconds to wait for one that hangs.

        Raises:
            UserError: the earlier write failed (disk full, no permission …).
        """
        limit = time.monotonic() + patience
        while True:
            try:
                self.wait()
            except NotWritten:
                if self.unwritten is None:
                    raise
            if not self._background.busy or time.monotonic() >= limit:
                return not self._background.busy
            time.sleep(0.1)

    def save(self, state: Mapping[str, Tensor] | list[Shard], info: CheckpointInfo) -> None:
        """Write a state in the background, if the store is ready; see `is_ready`.

        Args:
            state: this process's shards, a list that is emptied; or all tensors, on the host, if this process is alone. They
                must stay as they are until the store is ready again.
            info: what the marker says.

        Raises:
            UserError: the earlier write failed (disk full, no permission …).
        """
        if not self.is_ready() or (self._processes > 1 and info.step == self._saved):
            return
        shards = state if isinstance(state, list) else whole(state)
        self._failed, self._told_hanging = None, False
        what = f"{self.root}: the write of the checkpoint of step {info.step}"
        self._background.start(what, lambda: self._write(shards, info))

    def check(self) -> None:
        """Called between two steps: raises what a write has found that must end the run, and tells when a write hangs.

        Raises:
            UserError: the state that was to be saved is not to be used.
        """
        if self._background.hangs and not self._told_hanging and self.unwritten is not None:
            self._told_hanging = True
            self.unwritten(
                f"{self._background.what} makes no progress for {self._background.patience:.0f} s: does the disk or the bucket "
                "answer? Training goes on"
            )
        if not self._background.busy:
            self._settle()

    @property
    def owes(self) -> bool:
        """Whether the last write failed a while ago, so that another should be tried before it is due."""
        return self._failed is not None and time.monotonic() - self._failed[1] > RETRY

    def wait(self) -> None:
        """Wait until the last `save` is complete.

        Raises:
            UserError: the checkpoint could not be written, or the write hangs.
        """
        self._settle()
        if self._failed is not None:
            (error, _), self._failed = self._failed, None
            raise error

    def close(self) -> None:
        """Wait for the last `save`."""
        self.wait()

    def _settle(self) -> None:
        try:
            self._background.wait()
        except NotWritten as error:
            self._failed = error, time.monotonic()
        except Hanging as error:
            told, self._told_hanging = self._told_hanging, True
            if self.unwritten is not None and not told:
                self.unwritten(f"{error}: does the disk or the bucket answer?")
            hangs = NotWritten(f"{error}: start again to continue from the newest complete one")
            self._failed = hangs, time.monotonic()

    def _write(self, shards: list[Shard], info: CheckpointInfo) -> None:
        try:
            if self._processes == 1 and info.step in self.steps():
                return  # stopped right after a save: the checkpoint has this state, and rewriting would put it at risk
        except Exception as error:  # the bucket does not answer
            raise self._not_written(info.step, error) from error
        self._writing = info.step
        try:
            if (fault := not_finite({shard.name: shard.block for shard in shards})) is not None:
                raise UnusableState(self._refusal(info.step, fault))
            self._put(shards, info)
        except UnusableState as error:
            self._withdraw(info.step, str(error))
            raise
        except Exception as error:
            self._withdraw(info.step, _reason(error))
            raise self._not_written(info.step, error) from error
        finally:
            self._writing = None
        self._saved = info.step
        if self._process == 0:
            self._tidy(info.step)
            self.written(info.step)

    def _put(self, shards: list[Shard], info: CheckpointInfo) -> None:
        files, folders, path = self._folders.files, self._folders, self._folders.path(info.step)
        progress = self._background.progress
        if self._process == 0:
            self.remove_remainders(before=info.step)
            folders.remove_marker(info.step)  # of a damaged one
        if self._processes == 1:
            folders.remove(info.step)  # left behind by an interrupted write, or damaged
        files.makedirs(path, exist_ok=True)
        share = write_shards(files, path, self._process, taken_from(shards), progress)
        if is_local(files):
            sync_folder(path)
        if self._process > 0:
            write_part(files, path, self._process, self._processes, share)
            return
        index = collect_parts(files, path, share, self._processes, progress)
        info = replace(info, index=write_index(files, path, index), code=CODE)
        self.completing()
        write_marker(files, folders.marker(info.step), info)
        # Nothing older is removed before this one is shown to be there, as a later run will find it.
        read = read_marker(files, folders.marker(info.step), info.step)
        StoredTensors(files, path, read, self.folder(info.step)).close()
        self.damaged.pop(info.step, None)
        remove_parts(files, path, self._processes)

    def _tidy(self, step: int) -> None:
        """Remove what is not kept. An error there costs no checkpoint."""
        try:
            self.prune(before=step)
        except Exception as error:
            what = f"{self.root}: older checkpoints could not be removed ({_reason(error)})"
            if self.unwritten is None:
                raise UserError(what) from error
            self.unwritten(what)

    def _withdraw(self, step: int, why: str) -> None:
        """After a failed write: an incomplete checkpoint is useless, and takes up the missing space."""
        with contextlib.suppress(Exception):
            if self._processes == 1:
                self._folders.remove(step)
                return
            path = self._folders.path(step)
            remove_share(self._folders.files, path, self._process)
            if self._process > 0:
                write_part(self._folders.files, path, self._process, self._processes, why)

    def _refusal(self, step: int, fault: str) -> str:
        newest = self.newest()
        return (
            f"the state after step {step} is not saved: {fault}; lower --learning-rate, raise --warmup-steps or set "
            f"--max-grad-norm 1.0; "
            + ("there is no earlier checkpoint" if newest is None else f"the newest one is that of step {newest}")
        )

    def _not_written(self, step: int, error: BaseException) -> NotWritten:
        what = f"{self.root}: the checkpoint of step {step} could not be written ({_reason(error)}); earlier ones are complete"
        if self.unwritten is not None:
            # Several processes would have to agree on another time.
            again = f"in {RETRY:.0f} s, or " if self._processes == 1 else ""
            self.unwritten(f"{what}: training goes on, and another is tried {again}when it is due")
        return NotWritten(f"{what}: make room and start again to continue from the newest")


CODE = f"pretrain_xla {__version__}, torch {torch.__version__}"


def _best(losses: Mapping[int, float | None]) -> int | None:
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def _reason(error: BaseException) -> str:
    """The cause in a few words."""
    if (fault := disk_fault(error)) is not None:
        return fault
    words = str(error).strip().splitlines()
    return words[-1][:200] if words else type(error).__name__
