"""Tells what the run on this worker hangs in: processes, memory, disk, the stacks of its threads, its log: stacks.py NAME

A run prints its stacks to its log when it receives SIGUSR2. Processes that do not handle that signal would die of it, and do
not get it. No variables of the environment are shown.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stop import members  # type: ignore[import-not-found]  # the file beside this one

LINES = 300
COMMANDS = (
    ["ps", "-eo", "pid,ppid,sid,stat,etime,rss,wchan:24,args"],
    ["free", "-m"],
    ["df", "-h", "."],
    ["sh", "-c", "dmesg 2>/dev/null | tail -n 30"],
)


def handles(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def main(name: str) -> None:
    """The command line."""
    base = os.path.abspath(name)
    for command in COMMANDS:
        print("$", *command)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            print(subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace").stdout)
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(base, "pid"), encoding="utf-8") as file:
            session = os.getsid(int(file.read()))
        for process in members(session):
            with contextlib.suppress(OSError):
                if handles(process, signal.SIGUSR2):
                    os.kill(process, signal.SIGUSR2)
        time.sleep(2.0)
    with contextlib.suppress(OSError), open(os.path.join(base, "run.log"), "rb") as file:
        file.seek(max(0, os.path.getsize(file.name) - 2**18))
        print(f"the last {LINES} lines of the log:")
        print(*file.read().decode("utf-8", "replace").splitlines()[-LINES:], sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
