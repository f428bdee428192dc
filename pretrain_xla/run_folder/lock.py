"""A lock on a run's folder: one run at a time, released by the operating system when its holder ends for any reason.

The lock is the system's (`flock`); the file `run.lock` only names its holder, so a file left by a crash locks nothing. It
works on local disks, and between hosts on network disks that support such locks (NFS does). Buckets have no locks: two runs
in one bucket folder are not detected.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from pretrain_xla.errors import UserError

LOCK = "run.lock"


@contextlib.contextmanager
def alone_in(folders: dict[str, str]) -> Iterator[None]:
    """Lock the folders (setting → path) for the main process of a run.

    Raises:
        UserError: another run holds one; the text names its process and host.
    """
    with contextlib.ExitStack() as stack:
        held: set[str] = set()
        for key, folder in folders.items():
            real = os.path.realpath(folder)
            if real not in held:
                stack.enter_context(_hold(key, folder))
                held.add(real)
        yield


@contextlib.contextmanager
def _hold(key: str, folder: str) -> Iterator[None]:
    path = os.path.join(folder, LOCK)
    descriptor = _locked(key, folder, path)
    if descriptor is None:  # a network disk without locks
        yield
        return
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds too, only without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while locked: a process that opened it in the meantime sees that it is gone
        os.close(descriptor)


def _locked(key: str, folder: str, path: str) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{key}={folder} is in use by another run ({holder}): wait until it has ended, or name another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder removed it after we opened it and before we locked it
