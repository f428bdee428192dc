"""One run in a folder at a time: a lock that the system lets go of when its holder ends, however it ends.

The file `run.lock` says who holds it; the lock itself is the system's (`flock`), so what a crash leaves behind locks nothing.
It works on local disks, and between hosts on network disks that pass such locks on (NFS does). Buckets have no locks: there
nothing keeps two runs apart.
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
    """Hold the folders (key → path), each once, for the main process of a run.

    Raises:
        UserError: another run holds one; the text names it.
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
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is held: whoever has opened it meanwhile sees that it is gone
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
        os.close(descriptor)  # its holder has removed it between our opening and our locking
