"""Processes on a worker, which is a folder: started as `ssh` starts them, and killed when the machine goes.

Each session has a parent of its own that adopts what the session leaves behind (`PR_SET_CHILD_SUBREAPER`), so that all that
runs on a machine hangs below processes whose ids are in the machine's file `sessions`. What is killed are the process groups
found there, and nothing else; they are listed in the file `groups`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl


@dataclass
class Session:
    """A command on a machine, from the side that started it."""

    output: int
    errors: int
    status: int
    """Pipes; the last brings the exit status, or ends without one if the machine goes."""
    begun: float


def begin(machine: Path, command: str, environment: Mapping[str, str], stdin: int) -> Session:
    """Run a command with bash in the home of a machine."""
    pipes = [os.pipe() for _ in range(3)]
    started = time.time()
    if not os.fork():
        try:
            _parent(machine, command, environment, stdin, [write for _, write in pipes])
        finally:
            os._exit(70)
    for _, write in pipes:
        os.close(write)
    (output, _), (errors, _), (status, _) = pipes
    return Session(output, errors, status, started)


def _parent(machine: Path, command: str, environment: Mapping[str, str], stdin: int, pipes: list[int]) -> None:
    """Stay until nothing of the session runs any more."""
    output, errors, status = pipes
    os.setsid()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)
    with (machine / "sessions").open("a") as sessions:
        sessions.write(f"{os.getpid()} {_start_time(os.getpid())}\n")
    if not (child := os.fork()):
        os.setsid()
        for number, file in enumerate((stdin, output, errors)):
            os.dup2(file, number)
        os.closerange(3, 256)
        os.chdir(machine / "home")
        os.execve("/bin/bash", ["bash", "-c", command], dict(environment))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    for file in (output, errors):
        os.close(file)
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, code = os.wait()
            if pid == child:
                exit_status = os.waitstatus_to_exitcode(code)
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, str(exit_status if exit_status >= 0 else 128 - exit_status).encode())
                os.close(status)
    os._exit(0)


def kill(machine: Path) -> None:
    """End all that runs on a machine, at once, as when it loses its power."""
    parents = [pid for pid, begun in _sessions(machine) if _start_time(pid) == begun]
    for pid in parents:
        _send(os.kill, pid, signal.SIGSTOP)  # it must not end before those that it has adopted
    limit = time.monotonic() + 10
    while groups := {group for pid in parents for group in _groups_below(pid)} - {*parents}:
        with (machine / "groups").open("a") as file:
            file.writelines(f"{group}\n" for group in groups)
        for group in groups:
            _send(os.killpg, group, signal.SIGKILL)
        assert time.monotonic() < limit, f"{machine}: {groups} do not end"
        time.sleep(0.005)
    for pid in parents:
        _send(os.killpg, pid, signal.SIGKILL)


def signal_all(machine: Path, number: int) -> None:
    """Send a signal to all that runs on a machine."""
    for pid, begun in _sessions(machine):
        if _start_time(pid) == begun:
            for group in _groups_below(pid) - {pid}:
                _send(os.killpg, group, number)


def commands(machine: Path) -> list[str]:
    """Command lines of all that runs on a machine."""
    found = []
    for pid, begun in _sessions(machine):
        if _start_time(pid) == begun:
            for one in filter(_is_running, [pid, *_below(pid)]):
                with contextlib.suppress(OSError):
                    found.append(
                        Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    )
    return found


def environments(machine: Path) -> list[str]:
    """Environments of all that runs on a machine."""
    found = []
    for pid, begun in _sessions(machine):
        if _start_time(pid) == begun:
            for one in _below(pid):
                with contextlib.suppress(OSError):
                    found.append(Path(f"/proc/{one}/environ").read_bytes().decode("utf-8", "replace"))
    return found


def drop(machine: Path) -> None:
    """End the connections to a machine; what runs on it goes on."""
    (machine / "dropped").write_text(repr(time.time()))


def make_unreachable(machine: Path, seconds: float) -> None:
    """End the connections to a machine, and let no new ones come for a while."""
    (machine / "unreachable").write_text(repr(time.time() + seconds))
    drop(machine)


def is_reachable(machine: Path) -> bool:
    """Whether a connection to it can be made."""
    return (machine / "home").is_dir() and time.time() > _number(machine / "unreachable")


def is_dropped(machine: Path, session: Session) -> bool:
    """Whether the connection has ended since it was made."""
    return _number(machine / "dropped") >= session.begun


def _number(path: Path) -> float:
    try:
        return float(path.read_text() or "0")
    except FileNotFoundError:
        return 0.0


def _sessions(machine: Path) -> list[tuple[int, int]]:
    with contextlib.suppress(FileNotFoundError):
        return [
            (int(pid), int(begun)) for pid, begun in map(str.split, (machine / "sessions").read_text().splitlines())
        ]
    return []


def _start_time(pid: int) -> int:
    """When a process began, in ticks since the host did; 0 where there is none. A pid alone may name another by now."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _below(pid: int) -> list[int]:
    """Descendants of a process that still run."""
    found, left = [], [pid]
    while left:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{left.pop()}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        found += [one for one in left if one not in found]
    return [one for one in found if _is_running(one)]


def _groups_below(pid: int) -> set[int]:
    groups = set()
    for one in _below(pid):
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(one))
    return groups


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _send(call: object, target: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        call(target, number)  # type: ignore[operator]
