"""Asks the run on this worker to stop, and waits until it has saved: stop.py NAME SECONDS

After SECONDS it is killed. Prints how it ended. All of the run's processes are in the session of the process that keeps it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from follow import lives  # type: ignore[import-not-found]  # the file beside this one


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry)) == session:
                    found.append(int(entry))
    return found


def main(name: str, seconds: float) -> None:
    """The command line."""
    base = os.path.abspath(name)
    if not lives(base):
        print("not running")
        return
    with open(os.path.join(base, "pid"), encoding="utf-8") as file:
        supervisor = int(file.read())
    session = os.getsid(supervisor)
    os.kill(supervisor, signal.SIGTERM)
    ends = time.monotonic() + seconds
    while lives(base) and time.monotonic() < ends:
        time.sleep(0.1)
    if not lives(base):
        print("stopped")
        return
    for process in members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while lives(base):
        time.sleep(0.1)
    print(f"killed: it had not stopped within {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
