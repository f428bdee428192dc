"""What is known of a launch: in one local file, and as `launch.json` in the bucket, so that another terminal or machine can
take over.

It holds no secrets: only the names of the variables that have them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.launch.bucket import Bucket, write_file

FILE = "launch.json"


class LookedAfter(UserError):
    """Another launcher looks after the run. process: its id, if it is on this machine."""

    process: int | None = None


FOLDER = "PRETRAIN_XLA_LAUNCH_DIR"
"""Variable with the folder of local state files; otherwise ~/.local/state/pretrain_xla/launch."""
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
ENDED = ("done", "failed", "stopped", "spent")


@dataclasses.dataclass
class Lease:
    """A slice while it cost money: since when, until when (None: it still does), and dollars an hour."""

    zone: str
    since: float
    until: float | None
    dollars_per_hour: float


@dataclasses.dataclass
class State:
    """A launch. times in seconds since 1970."""

    name: str
    bucket: str
    project: str
    topology: str
    zones: list[str]
    tier: str
    arguments: list[str]
    """Of the training command."""
    environment: dict[str, str]
    secrets: list[str]
    """Names of variables."""
    extras: list[str]
    """Packages that are installed besides those that the code requires."""
    commit: str
    hosts: int
    network: dict[str, Any]
    max_dollars: float | None
    max_hours: float | None
    price_per_chip_hour: float | None
    stall_minutes: float
    keep: bool
    created: float
    phase: str = "new"
    """new, acquiring, setting up, running, stopping, then one of `ENDED`."""
    zone: str | None = None
    """Where the present request or slice is."""
    attempt: int = 0
    """Number of the present slice, from 1."""
    leases: list[Lease] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Package → version, the same on every worker of every slice."""
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The newest row of the metrics, with `steps` (of the run) and `seen`."""
    offset: int = 0
    """Bytes of the present slice's log that have been shown."""
    message: str = ""
    """Why it ended, or what it does."""
    holder: str = ""
    """Host and process that look after it."""
    holder_seen: float = 0.0

    def hours(self, now: float) -> float:
        """Hours for which slices have been paid so far."""
        return sum(max((lease.until or now) - lease.since, 0.0) for lease in self.leases) / 3600

    def dollars(self, now: float) -> float:
        """What they cost."""
        return sum(
            max((lease.until or now) - lease.since, 0.0) / 3600 * lease.dollars_per_hour for lease in self.leases
        )

    def to_json(self) -> bytes:
        """As a file."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def from_json(content: bytes, where: str) -> State:
    """The state in a file.

    Raises:
        UserError: it is not one.
    """
    try:
        tree = json.loads(content)
        leases = [Lease(**lease) for lease in tree.pop("leases")]
        return State(**tree, leases=leases)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{where} is not the state of a launch of this version: look there, or remove it") from None


def folder() -> str:
    """Where local state files are."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.environ.get(FOLDER) or os.path.join(home, "pretrain_xla", "launch")


def local_path(name: str) -> str:
    """The local file of a run.

    Raises:
        UserError: that cannot be the name of a run.
    """
    check_name(name)
    return os.path.join(folder(), f"{name}.json")


def check_name(name: str) -> None:
    """Check that Google Cloud takes this name.

    Raises:
        UserError: it does not.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: begin with a letter, then small letters, digits and dashes, 63 in all")


def read_local(name: str) -> State | None:
    """The state in the local file. None means that there is none."""
    path = local_path(name)
    try:
        with open(path, "rb") as file:
            return from_json(file.read(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def newest(name: str, bucket: Bucket) -> State | None:
    """The state in the bucket or in the local file, whichever was written last. None means that the run is new."""
    content = bucket.read(FILE)
    there = from_json(content, f"{bucket.url}/{FILE}") if content is not None else None
    here = read_local(name)
    if here is not None and here.bucket != bucket.url:
        here = None  # another run of this name, or its folder was moved
    both = [state for state in (there, here) if state is not None]
    return max(both, key=lambda state: state.holder_seen, default=None)


def write_local(state: State) -> None:
    """Write the local file."""
    write_file(local_path(state.name), state.to_json())


def holder() -> str:
    """This process, as others know it."""
    return f"{socket.gethostname()} process {os.getpid()}"


def check_free(state: State, now: float, lease: float) -> None:
    """Check that no launcher on another machine looks after this run.

    Raises:
        UserError: one does.
    """
    age = now - state.holder_seen
    ours = state.holder.split(" process ")[0] == socket.gethostname()  # then the lock decides
    if state.phase not in ENDED and state.holder and not ours and age < lease:
        raise LookedAfter(
            f"{state.name} is looked after by {state.holder}, {age:.0f} s ago: stop it there, or wait {lease:.0f} s after it "
            "is gone; `launch status` and `launch logs` only look"
        )


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Be the only launcher of a run on this machine; the system releases it however this process ends.

    Raises:
        UserError: another is.
    """
    path = local_path(name)[: -len(".json")] + ".lock"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip()
            error = LookedAfter(
                f"{name} is looked after by process {process or '?'} of this machine: end it with Ctrl-C, or "
                f"`launch logs {name}` to look on"
            )
            error.process = int(process) if process.isdecimal() else None
            raise error from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
