"""Warnings of XLA's compiler, summarised in one line.

If a tensor has one sharding, is needed with another, and the partitioner has no direct way between the two, it first replicates
the tensor. It warns of that on stderr; the TPU's compiler does so in a log file, where nobody would read it.
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
    """One line on all such warnings. None means that there are none. what: what was compiled, such as `the train step`."""
    marked = [line for line in lines if MARK in line]
    if not marked:
        return None
    shapes = [match.groups() for line in marked if (match := _SHAPE.search(line))]
    largest = max(shapes, key=_size, default=None)
    named = f", the largest {largest[0]}[{largest[1]}] on one device" if largest else ""
    tensors = "1 tensor" if len(marked) == 1 else f"{len(marked)} tensors"
    return (
        f"the compiler finds no direct way to reshard {tensors} of {what} over the mesh{named}: "
        "it copies them whole to every device first, which costs time and memory; another mesh may not need it"
    )


def _size(shape: tuple[str, ...]) -> int:
    return _BYTES.get(shape[0], 1) * math.prod(int(length) for length in shape[1].split(",") if length)


def libtpu_log(folder: str | None = None) -> list[str]:
    """Lines that the TPU's compiler has logged as warnings in this process."""
    folder = folder or os.environ.get("TPU_LOG_DIR", "/tmp/tpu_logs")
    lines: list[str] = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), f"*.WARNING.*.{os.getpid()}"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines += file.readlines()
    return lines


@contextlib.contextmanager
def compiler_warnings() -> Iterator[list[str]]:
    """While it is open, move such warnings from the process's stderr (below Python) to the list.

    All other output goes to stderr at once: a compiler that dies prints the reason there.
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
        # A process started meanwhile may hold the other end for longer: the thread continues to forward its lines.
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
