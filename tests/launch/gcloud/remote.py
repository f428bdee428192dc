"""`gcloud compute tpus tpu-vm ssh` and `scp`, as SDK 528 does them.

gcloud looks at the node once, and then runs `ssh` for each worker. Whenever `ssh` itself fails (255) it runs it again, up to
ten times: a command may begin more than once. `ssh` ends when the command has ended *and* nothing holds its output any more.
What a command leaves behind goes on without a connection, and gets a broken pipe if it writes to it.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from . import machines, texts
from .machines import Session
from .nodes import address, find
from .state import Record, State
from .syntax import Call

TRIES = 10
_UNUSABLE = ("STOPPED", "STOPPING", "DELETING", "HIDDEN", "PREEMPTED", "TERMINATED")


def prepare(state: State, call: Call, zone: str) -> Record:
    """What `ssh` and `scp` need to know of the node; afterwards the state is let go."""
    name = next((one.partition(":")[0] for one in call.positionals if ":" in one), call.positionals[0])
    node = find(state, name.rpartition("@")[2], zone)
    if node["state"] in _UNUSABLE:
        raise texts.unusable(node["state"])
    workers = _workers(call.values.get("--worker", "0"), node["workers"])
    if node["state"] != "READY":
        _say(
            f'WARNING: The TPU VM "{node["id"]}" is in state "{node["state"]}", therefore the TPU may not be available or '
            "reachable. If the connection fails, please try again later."
        )
    if len(workers) > 1 and "--command" not in call.values and call.words.endswith("ssh"):
        raise texts.Failed("Invalid value for [--worker]: cannot target multiple workers without the `--command` flag.")
    if len(workers) > 1 and not state.data["ssh_agent"]:
        raise texts.Failed(
            'SSH Key is not present in the SSH agent. Please run "ssh-add ~/.ssh/google_compute_engine" to add it, and try '
            "again."
        )
    return {
        "machines": {str(worker): str(state.machine(node, worker)) for worker in workers},
        "addresses": {str(worker): address(node, worker) for worker in workers},
        "environment": state.data["worker_environment"],
        "pause": state.data["ssh_retry"],
    }


def ssh(call: Call, known: Record) -> int:
    """Run a command on the workers; returns the status of the first that failed."""
    count = len(known["machines"])
    _say(f"Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of {count} workers.")
    command = call.values.get("--command")
    assert command is not None, "the stand-in has no terminal: ssh needs --command"
    connections = [_Connection(worker, known, command) for worker in known["machines"]]
    nothing = os.open(os.devnull, os.O_RDONLY)
    for position, one in enumerate(connections):
        one.stdin = 0 if position == 0 else nothing  # ssh reads all that it gets: those after the first get nothing
    while any(one.status is None for one in connections):
        _pass_on(connections)
    for one in connections:
        if one.status and count > 1:
            _say(f"##### Command execution on worker {one.worker} failed with exit status {one.status}. Continuing.")
    failed = next((one for one in connections if one.status), None)
    if failed is not None and failed.gave_up:
        raise texts.Failed(texts.EXITED, 255)
    return 0 if failed is None else int(failed.status or 0)


class _Connection:
    """The `ssh` to one worker."""

    def __init__(self, worker: str, known: Record, command: str) -> None:
        self.worker, self._command, self._pause = worker, command, known["pause"]
        self._machine, self._address = Path(known["machines"][worker]), known["addresses"][worker]
        self._environment = {
            "HOME": str(self._machine / "home"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "USER": "someone",
            "LANG": "C.UTF-8",
            **{name: value.replace("{worker}", worker) for name, value in known["environment"].items()},
        }
        self.stdin = 0
        self.status: int | None = None
        self.gave_up = False
        self.session: Session | None = None
        self._tries, self._not_before = 0, 0.0
        self.open: dict[int, int] = {}
        """Pipes that are open: → where what comes is written to."""
        self._said = b""

    def connect(self) -> None:
        """Begin, where it is time to."""
        if self.session is not None or self.status is not None or time.monotonic() < self._not_before:
            return
        _say(f"SSH: Attempting to connect to worker {self.worker}...")
        if not machines.is_reachable(self._machine):
            self.fail(texts.TIMED_OUT.format(address=self._address))
            return
        self.session = machines.begin(self._machine, self._command, self._environment, self.stdin)
        self.open = {self.session.output: 1, self.session.errors: 2, self.session.status: 0}

    def read(self, pipe: int) -> None:
        """Pass on what has come."""
        part = os.read(pipe, 2**16)
        if not part:
            os.close(pipe)
            target = self.open.pop(pipe)
            if target == 0 and not self._said:
                self.fail(f"Connection to {self._address} closed by remote host.")
            elif not self.open:
                self.status = int(self._said)
        elif self.open[pipe]:
            os.write(self.open[pipe], part)
        else:
            self._said += part

    def look(self) -> None:
        """Notice that the connection has dropped."""
        if self.session is not None and self.open and machines.is_dropped(self._machine, self.session):
            self.fail(texts.BROKEN)

    def fail(self, said: str) -> None:
        """`ssh` ends with 255, and gcloud tries again."""
        for pipe in self.open:
            os.close(pipe)
        self.open, self.session, self._said = {}, None, b""
        _say(said)
        self._tries += 1
        if self._tries == TRIES:
            self.status, self.gave_up = 255, True
            return
        _say(texts.RETRYING)
        self._not_before = time.monotonic() + self._pause


def _pass_on(connections: list[_Connection]) -> None:
    for one in connections:
        one.connect()
        one.look()
    by_pipe = {pipe: one for one in connections for pipe in one.open}
    ready, _, _ = select.select([*by_pipe], [], [], 0.02)
    for pipe in ready:
        if pipe in by_pipe[pipe].open:
            by_pipe[pipe].read(pipe)


def scp(call: Call, known: Record) -> int:
    """Copy files to the home of each worker, or from one."""
    *sources, target = call.positionals
    for machine in (Path(one) for one in known["machines"].values()):
        if not machines.is_reachable(machine):
            raise texts.Failed(texts.EXITED.replace("ssh", "scp"), 255)
        for source in sources:
            _copy(_place(source, machine), _place(target, machine), "--recurse" in call.switches)
    return 0


def _place(name: str, machine: Path) -> Path:
    node, colon, path = name.partition(":")
    if not colon or "/" in node:
        return Path(name).expanduser()
    return machine / "home" / path.removeprefix("~/").removeprefix("~")


def _copy(source: Path, target: Path, recurse: bool) -> None:
    if source.is_dir() and not recurse:
        raise texts.Failed(f"scp: {source}: not a regular file", 1)
    if not source.exists():
        raise texts.Failed(f"scp: {source}: No such file or directory", 1)
    place = target / source.name if target.is_dir() else target
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, place)


def _workers(text: str, count: int) -> list[int]:
    if text.upper() == "ALL":
        return [*range(count)]
    chosen: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise texts.Failed(
                f"Invalid value for [--worker]: unable to parse worker ID {part}. Please only use numbers."
            )
        chosen |= {*range(int(first), int(last if dash else first) + 1)}
    if not chosen or max(chosen) >= count:
        raise texts.Failed(
            f"Invalid value for [--worker]: worker index {max(chosen, default=0)} is larger than the valid worker indexes on "
            f"this TPU VM. Please only use indexes in the range [0, {count - 1}], inclusive."
        )
    return sorted(chosen)


def _say(*lines: Any) -> None:
    print(*lines, file=sys.stderr, flush=True)
