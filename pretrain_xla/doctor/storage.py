"""How fast a folder or a bucket takes a checkpoint and gives it back; any fsspec URL.

A file of random bytes (which no disk compresses) is written, made to reach the disk, read past the page cache where the system
allows that, compared, and removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Any

from pretrain_xla.doctor.check import Check, failed
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted
from pretrain_xla.storage.files import filesystem, is_local, missing_folders, remove_empty, url
from pretrain_xla.storage.retries import with_retries
from pretrain_xla.system_faults import disk_fault

PART = 2**24
SLOWEST = {True: 20e6, False: 5e6}
"""Bytes/s, local and remote, below which a checkpoint of GPT-2 small (1.5 GB) takes minutes."""

CHECK_ACCESS = (
    "check the name, your credentials (gcloud auth application-default login, or the VM's scopes), the permissions"
)


def check_storage(where: str, size: int) -> Check:
    """Write and read `size` bytes at a folder or URL.

    Args:
        where: local folder, which is created if it is missing, or any URL that fsspec knows.
        size: bytes.
    """
    name = f"storage {redacted(where)}"
    try:
        fs, root = filesystem(where)
    except UserError as error:
        return failed(name, str(error), "name a folder, or a URL such as gs://bucket/folder")
    local = is_local(fs)
    new_folders = missing_folders(root) if local else []
    path = f"{root}/doctor_{secrets.token_hex(8)}.tmp"
    part, count = os.urandom(min(PART, size)), -(-size // PART)
    try:
        write_seconds, read_seconds, changed = _times(fs, path, part, count)
        if changed is not None:
            return failed(
                name,
                f"part {changed} of {count} of a file came back changed",
                "keep no checkpoints there: what it gives back is not what was written",
            )
        return _judge(name, local, count * len(part), write_seconds, read_seconds)
    except UserError as error:  # with_retries: the text names the URL
        return failed(name, str(error), CHECK_ACCESS)
    except Exception as error:  # whatever a file system's library raises
        if local and not isinstance(error, OSError):
            raise
        reason = disk_fault(error) or getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        fix = "name a folder that you may write to" if local else CHECK_ACCESS
        return failed(name, redacted(" ".join(str(reason).split()))[:300], fix)
    finally:
        with contextlib.suppress(Exception):
            fs.rm_file(path)
        remove_empty(new_folders)


def _times(fs: Any, path: str, part: bytes, count: int) -> tuple[float, float, int | None]:
    """Seconds to write and to read a file of `count` equal parts, and the number of the first that came back changed."""
    local = is_local(fs)

    def write() -> None:
        with fs.open(path, "wb") as file:
            for _ in range(count):
                file.write(part)
            if local:
                file.flush()
                os.fsync(file.fileno())

    def read() -> int | None:
        with fs.open(path, "rb") as file:
            if local and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return next((number for number in range(1, count + 1) if file.read(len(part)) != part), None)

    if local:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    began = time.perf_counter()
    write() if local else with_retries(url(fs, path), write, "written")
    written = time.perf_counter()
    changed = read() if local else with_retries(url(fs, path), read)
    return written - began, time.perf_counter() - written, changed


def _judge(name: str, local: bool, size: int, write_seconds: float, read_seconds: float) -> Check:
    """The verdict on measured times."""
    write, read = size / max(write_seconds, 1e-9), size / max(read_seconds, 1e-9)
    figures = {"bytes": size, "write_bytes_per_second": write, "read_bytes_per_second": read}
    found = f"writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s ({size / 2**20:,.0f} MiB)"
    expected = f"at least {SLOWEST[local] / 1e6:.0f} MB/s"
    if min(write, read) < SLOWEST[local]:
        fix = "choose a faster disk" if local else "choose a bucket in the zone's region"
        return failed(name, found, f"{fix}: saving would take long", expected, **figures)
    return Check(name, "ok", found, expected, figures=figures)
