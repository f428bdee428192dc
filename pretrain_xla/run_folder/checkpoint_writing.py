"""Writing one process's share of a checkpoint, and completing the checkpoint once all shares are there.

Each process writes its shards into a file of its own, in the format of `torch.distributed.checkpoint` (DCP), and then lists
them in a small file, its part. The main process waits for all parts, joins them to the index, and writes the marker last. So
the processes need no other way to speak to each other than the folder, which they share, and a thread of each can do it behind
the training.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint_index import INDEX, Block, File, Index, StoredTensor, decode, join
from pretrain_xla.run_folder.checkpoint_metadata import METADATA, write_metadata
from pretrain_xla.runtime.shards import Shard
from pretrain_xla.storage.files import is_local, write_atomically

SYNCED = 1 << 26
"""Bytes after which a file on a disk is synced: little is left to wait for at the end, and the disk stays free for others."""
CHUNK = 1 << 23
"""Bytes given to the file system at a time; after each, the write is known to make progress."""
POLL = 0.2
"""Seconds between two looks for the parts of other processes."""
LATEST = 300.0
"""Seconds that the main process waits for the parts of the others."""

Progress = Callable[[], None]


def data_file(process: int) -> str:
    """Name of a process's file of tensors, as DCP names it."""
    return f"__{process}_0.distcp"


def part_file(process: int) -> str:
    """Name of the list of a process's shards; it is removed once the checkpoint is complete."""
    return f"__{process}_0.part.json"


def write_shards(files: Any, folder: str, process: int, shards: Iterator[Shard], progress: Progress) -> Index:
    """Write the shards of a process into its file, and return their index.

    Args:
        files: fsspec file system.
        folder: the checkpoint's folder on it.
        process: number of the process.
        shards: host tensors; each is released when it is written, if nobody else holds it.
        progress: called whenever some bytes are written.

    Raises:
        OSError and others: the disk is full, the bucket does not answer …
    """
    name = data_file(process)
    tensors: dict[str, StoredTensor] = {}
    with _Stream(files, f"{folder}/{name}", progress) as stream:
        for shard in shards:
            start = stream.tell()
            stream.checksum = 0
            _save(shard, stream)
            shape = tuple(shard.block.shape)
            block = Block(shard.offsets, shape, name, start, stream.tell() - start, stream.checksum)
            had = tensors[shard.name].blocks if shard.name in tensors else ()
            tensors[shard.name] = StoredTensor(shard.block.dtype, shard.shape, (*had, block))
        size = stream.tell()
    return Index(tensors, {name: File(size)})


def write_part(files: Any, folder: str, process: int, processes: int, share: Index | str) -> None:
    """Tell the main process that this process's shards are written, or, with a text, why they are not."""
    about: dict[str, Any] = {"process": process, "processes": processes}
    if isinstance(share, str):
        share, about = Index({}, {}), about | {"failed": share}
    put(files, f"{folder}/{part_file(process)}", share.encode(**about))


def collect_parts(files: Any, folder: str, own: Index, processes: int, progress: Progress) -> Index:
    """Wait for the parts of all processes, as the main one, and join them.

    Raises:
        UserError: a process could not write its shards, or its part did not come in time.
    """
    shares, deadline = {0: own}, time.monotonic() + LATEST
    while len(shares) < processes:
        for process in range(1, processes):
            if process in shares or not files.exists(path := f"{folder}/{part_file(process)}"):
                continue
            with files.open(path, "rb") as file:
                share, about = decode(file.read())
            if "failed" in about:
                raise UserError(f"process {process} could not write its share: {about['failed']}")
            if about.get("processes") == processes and about.get("process") == process:
                shares[process] = share
        progress()
        if len(shares) < processes and time.monotonic() > deadline:
            late = ", ".join(str(process) for process in range(processes) if process not in shares)
            raise UserError(
                f"the shares of processes {late} of {processes} did not come within {LATEST:.0f} s; all hosts must see the "
                "same checkpoints_dir"
            )
        if len(shares) < processes:
            time.sleep(POLL)
            files.invalidate_cache(folder)
    return join([shares[process] for process in range(processes)])


def write_index(files: Any, folder: str, index: Index) -> int:
    """Write `.metadata` and `index.json`; returns the checksum of the index for the marker."""
    metadata = write_metadata(index)
    put(files, f"{folder}/{METADATA}", metadata)
    described = File(len(metadata), zlib.crc32(metadata))
    content = Index(index.tensors, {**index.files, METADATA: described}).encode()
    put(files, f"{folder}/{INDEX}", content)
    return zlib.crc32(content)


def put(files: Any, path: str, content: bytes) -> None:
    """Write a small file atomically: on a disk synced and renamed, in a bucket in one put."""
    if is_local(files):
        write_atomically(files, path, [content])
    else:
        files.pipe_file(path, content)


def remove_share(files: Any, folder: str, process: int) -> None:
    """Remove what a process wrote of a checkpoint that failed: it takes up the missing space."""
    for name in (data_file(process), part_file(process)):
        with contextlib.suppress(Exception):
            files.rm_file(f"{folder}/{name}")


def remove_parts(files: Any, folder: str, processes: int) -> None:
    """Remove the parts of a complete checkpoint. They do no harm if that fails."""
    for process in range(1, processes):
        with contextlib.suppress(Exception):
            files.rm_file(f"{folder}/{part_file(process)}")


def _save(shard: Shard, stream: _Stream) -> None:
    block = shard.block.detach().contiguous()
    if block.untyped_storage().nbytes() != block.numel() * block.element_size():
        block = block.clone()  # torch.save writes all of the memory that a tensor is a view of
    file: Any = stream
    torch.save(block, file)


class _Stream(io.RawIOBase):
    """A file that is written in chunks, with a checksum and a report of progress.

    checksum: CRC-32 of the bytes since it was set to 0.
    """

    def __init__(self, files: Any, path: str, progress: Progress) -> None:
        self._file: Any = files.open(path, "wb")
        self._progress = progress
        self._is_local = is_local(files)
        self._written, self._synced = 0, 0
        self._error: Exception | None = None
        self.checksum = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), CHUNK):
                self._write(view[start : start + CHUNK])
        except Exception as error:
            self._error = error
            raise
        return len(view)

    def _write(self, chunk: memoryview) -> None:
        self._file.write(chunk)
        self.checksum = zlib.crc32(chunk, self.checksum)
        self._written += len(chunk)
        if self._written - self._synced >= SYNCED:
            self._sync()
        self._progress()

    def _sync(self) -> None:
        self._synced = self._written
        if self._is_local:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Sync and close. After an error the file is left as it is; closing it may fail again."""
        if kind is None:
            self._sync()
            self._file.close()
            return
        with contextlib.suppress(Exception):
            self._file.close()
        if self._error is not None and self._error is not error:
            raise self._error from None  # torch.save would only report `unexpected pos 704 vs 598`


def taken_from(shards: list[Shard]) -> Iterator[Shard]:
    """The shards, each taken out of the list, so that memory is freed while they are written."""
    shards.reverse()
    while shards:
        yield shards.pop()
