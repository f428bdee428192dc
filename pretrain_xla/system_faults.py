"""What a machine runs out of (memory, room on a disk, open files), found in whatever error a library makes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator

MOST_OPEN_FILES = 1 << 20
"""A soft limit above this costs programs that close every possible descriptor their time, and nobody needs it."""

_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc")
# CUDA and XLA say `out of memory` in many sentences; XLA's status is RESOURCE_EXHAUSTED where it is shown.
_DEVICE = re.compile(r"out of memory|RESOURCE_EXHAUSTED|_STATUS_ALLOC_FAILED", re.IGNORECASE)
_FULL = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "free some of your quota, or name another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another folder",
}
_OPEN_FILES = {
    errno.EMFILE: "raise the limit for this shell (ulimit -n 65536)",
    errno.ENFILE: "raise fs.file-max, or close other programs",
}


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, also within what `torch.distributed.checkpoint` wraps around one."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        failures = getattr(one, "failures", None)
        wrapped = [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
        waiting += [inner for inner in (*wrapped, one.__cause__, one.__context__) if inner is not None]


def memory_fault(error: BaseException) -> str | None:
    """Whose memory ran out, with the message of the library that asked for it. None means it is another error."""
    for one in causes(error):
        text = str(one)
        words = f" ({_first_line(text)})" if text.strip() else ""
        if isinstance(one, RuntimeError | ValueError):  # torch.OutOfMemoryError is one, and so is all that XLA says
            if _DEVICE.search(text) or type(one).__name__ == "OutOfMemoryError":
                return f"the device is out of memory{words}"
            if _HOST.search(text):
                return f"this machine is out of memory{words}"
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno == errno.ENOMEM):
            return f"this machine is out of memory{words}"
    return None


def disk_fault(error: BaseException) -> str | None:
    """What is full, and how to fix it, in a clause. None means it is another error."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in _FULL:
            return f"{os.strerror(one.errno)}: {_FULL[one.errno]}"
    return None


def system_fault(error: BaseException) -> str | None:
    """One line on what the machine ran out of, whatever the command. None means it is another error."""
    if (memory := memory_fault(error)) is not None:
        return f"{memory}: ask for less at a time, or use a machine with more"
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in (_FULL | _OPEN_FILES):
            where = f"{one.filename}: " if isinstance(one.filename, str) else ""
            return f"{where}{os.strerror(one.errno)}: {(_FULL | _OPEN_FILES)[one.errno]}"
    return None


def reason(error: BaseException) -> str:
    """An error's cause in a few words, for the middle of a line: the system's own where it has one."""
    for one in causes(error):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return _first_line(str(error)) or type(error).__name__


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it; each shard that is read is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a container may forbid it: then the limit stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_line(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
