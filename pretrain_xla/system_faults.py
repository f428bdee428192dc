"""Recognise the errors of any library that mean: out of memory, disk full, or too many open files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator

MOST_OPEN_FILES = 1 << 20
"""A higher soft limit would slow down programs that close every possible descriptor."""

_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc")
# CUDA and XLA say `out of memory` in many ways. XLA's status, if shown, is RESOURCE_EXHAUSTED.
_DEVICE = re.compile(r"out of memory|RESOURCE_EXHAUSTED|_STATUS_ALLOC_FAILED", re.IGNORECASE)
_FULL = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "free some of your quota, or name another folder",
    errno.EFBIG: "raise the limit on file size (ulimit -f), or name another folder",
}
_OPEN_FILES = {
    errno.EMFILE: "raise the limit for this shell (ulimit -n 65536)",
    errno.ENFILE: "raise fs.file-max, or close other programs",
}


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, including those that `torch.distributed.checkpoint` wraps."""
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
    """Whether the device or the host is out of memory, with the library's message. None means another error."""
    for one in causes(error):
        text = str(one)
        words = f" ({_first_line(text)})" if text.strip() else ""
        if isinstance(one, RuntimeError | ValueError):  # torch.OutOfMemoryError and XLA's errors are RuntimeErrors
            if _DEVICE.search(text) or type(one).__name__ == "OutOfMemoryError":
                return f"the device is out of memory{words}"
            if _HOST.search(text):
                return f"the host is out of memory{words}"
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno == errno.ENOMEM):
            return f"the host is out of memory{words}"
    return None


def disk_fault(error: BaseException) -> str | None:
    """What is full, and how to fix it. None means another error."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in _FULL:
            return f"{os.strerror(one.errno)}: {_FULL[one.errno]}"
    return None


def system_fault(error: BaseException) -> str | None:
    """What ran out, and how to fix it, for any command. None means another error."""
    if (memory := memory_fault(error)) is not None:
        return f"{memory}: process less at a time, or use a host or device with more memory"
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in (_FULL | _OPEN_FILES):
            where = f"{one.filename}: " if isinstance(one.filename, str) else ""
            return f"{where}{os.strerror(one.errno)}: {(_FULL | _OPEN_FILES)[one.errno]}"
    return None


def reason(error: BaseException) -> str:
    """The cause of an error in a few words: those of the operating system, if there are any."""
    for one in causes(error):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return _first_line(str(error)) or type(error).__name__


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows: each shard being read is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_line(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
