"""What XLA's compiler warns of while it compiles, once and in words.

When a tensor is split over the mesh in one way and needed in another, and the partitioner knows no direct way between the two,
it copies the whole of it to every device first. It says so in lines of its own: on stderr, but the TPU's compiler in a file of
its log that nobody reads.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator

MARK = "Involuntary full rematerialization"
PREAMBLE = "All log messages before absl::InitializeLog() is called"
_SHAPE = re.compile(r"for HLO operation %\S+ = (\w+)\[([0-9,]*)\]")
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}


def in_words(lines: Iterable[str], what: str) -> str | None:
    """One line on all such warnings, or none where there is none; `what` was compiled, as `the train step`."""
    marked = [line for line in lines if MARK in line]
    if not marked:
        return None
    shapes = [match.groups() for line in marked if (match := _SHAPE.search(line))]
    largest = max(shapes, key=_size, default=None)
    named = f", the largest {largest[0]}[{largest[1]}] on one device" if largest else ""
    tensors = "1 tensor" if len(marked) == 1 else f"{len(marked)} tensors"
    return (
        f"the compiler finds no direct way to bring {tensors} of {what} from one split over the mesh to another{named}: "
        "it copies them whole to every device first, which costs time and memory; another mesh may not need it"
    )


def _size(shape: tuple[str, ...]) -> int:
    return _BYTES.get(shape[0], 1) * math.prod(int(length) for length in shape[1].split(",") if length)


def libtpu_log(folder: str | None = None) -> list[str]:
    """Lines that the TPU's compiler has logged in this process as warnings."""
    folder = folder or os.environ.get("TPU_LOG_DIR", "/tmp/tpu_logs")
    lines: list[str] = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), f"*.WARNING.*.{os.getpid()}"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines += file.readlines()
    return lines


@contextlib.contextmanager
def compiler_warnings() -> Iterator[list[str]]:
    """While it is open, take such warnings out of what the process writes to stderr, below Python; they end up in the list.

    All else goes on to stderr at once, since a compiler that dies says why there.
    """
    found: list[str] = []
    logged = len(libtpu_log())
    try:
        real = os.dup(2)
    except OSError:  # the process has no stderr
        yield found
        return
    read_end, write_end = os.pipe()
    thread = threading.Thread(target=_forward, args=(read_end, real, found), name="compiler warnings", daemon=True)
    thread.start()
    if sys.stderr is not None:
        sys.stderr.flush()
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield found
    finally:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(real, 2)
        # A process started meanwhile may hold the other end for longer: the thread goes on to pass its lines.
        thread.join(timeout=1.0)
        found += [line for line in libtpu_log()[logged:] if MARK in line]


def _forward(read_end: int, real: int, found: list[str]) -> None:
    with os.fdopen(read_end, "rb") as lines, os.fdopen(real, "wb", buffering=0) as stderr:
        for line in lines:
            text = line.decode(errors="replace")
            if MARK in text:
                found.append(text)
            elif PREAMBLE not in text:
                stderr.write(line)
