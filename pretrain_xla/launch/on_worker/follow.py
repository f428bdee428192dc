"""Shows the log of the run on this worker, and how it is, as lines of JSON: follow.py NAME OFFSET SECONDS BEAT

{"log": TEXT, "begin": BYTE, "offset": BYTE} are whole lines of the log from byte OFFSET on, with where they begin and end.
{"status": …}, every BEAT seconds and at the end, says whether the run lives, its exit status if it ended, and the newest row of
the metrics. Ends after SECONDS, or with the run. Whoever follows goes on from the last offset that arrived.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from typing import Any

PART = 2**16
TAIL = 2**16


def lives(base: str) -> bool:
    """Whether the process that keeps the run is there: it holds the lock."""
    try:
        lock = os.open(os.path.join(base, "run.lock"), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def newest_row(base: str) -> dict[str, Any] | None:
    """The newest row of a training step in the metrics."""
    try:
        with open(os.path.join(base, "run", "metrics.jsonl"), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # a line that is being written, or the middle of one
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return None


def read_log(base: str, offset: int) -> tuple[str, int]:
    """Whole lines of the log from an offset on, and where they end."""
    try:
        with open(os.path.join(base, "run.log"), "rb") as file:
            file.seek(offset)
            part = file.read(PART)
    except OSError:
        return "", offset
    whole = part if len(part) == PART and b"\n" not in part else part[: part.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace"), offset + len(whole)


def status(base: str) -> dict[str, Any]:
    """How the run is."""
    alive = lives(base)
    try:
        with open(os.path.join(base, "exit"), encoding="utf-8") as file:
            code = int(file.read())
    except (OSError, ValueError):
        code = None
    return {"running": alive, "exit": None if alive else code, "row": newest_row(base)}


def say(line: dict[str, Any]) -> None:
    """One line, at once."""
    print(json.dumps(line), flush=True)


def main(name: str, offset: int, seconds: float, beat: float) -> None:
    """The command line."""
    base, ends, next_status = os.path.abspath(name), time.monotonic() + seconds, 0.0
    while True:
        now = status(base)  # before the log is read: what a run wrote before its end is shown
        while (part := read_log(base, offset))[0]:
            say({"log": part[0], "begin": offset, "offset": part[1]})
            offset = part[1]
        over = not now["running"] or time.monotonic() >= ends
        if over or time.monotonic() >= next_status:
            say({"status": now})
            next_status = time.monotonic() + beat
        if over:
            return
        time.sleep(min(1.0, beat))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
