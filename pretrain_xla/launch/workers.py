"""The workers of a slice: the code and its environment on each alike, and the run started, stopped and examined there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pretrain_xla.launch.acquire import GONE_NODES, look
from pretrain_xla.launch.calls import ON_WORKER, on_worker, unpack
from pretrain_xla.launch.context import Failed, Launch, Lost
from pretrain_xla.launch.gcloud import GcloudError, Kind
from pretrain_xla.launch.progress import counted

Result = TypeVar("Result")
AT_A_TIME = 16
FAILURES = 3
"""How often a command may fail on a worker; gcloud runs it again after a dropped connection, without its standard input."""
PAUSE = 5.0
"""Seconds until a worker that did not answer is asked again, at most."""


def each(launch: Launch, action: Callable[[int], Result], workers: list[int] | None = None) -> list[Result]:
    """An action on each worker, several at a time; an error, or Ctrl-C, ends those that go on."""
    chosen = list(range(launch.state.hosts)) if workers is None else workers
    launch.cancelled.clear()
    pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="worker")
    try:
        return [future.result() for future in [pool.submit(action, worker) for worker in chosen]]
    except BaseException:
        launch.cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)
        launch.gcloud.end_all()
        raise
    finally:
        pool.shutdown()


def ssh(launch: Launch, worker: int, command: str, stdin: bytes = b"", seconds: float | None = None) -> str:
    """Run a command on a worker; returns what it printed."""
    zone = launch.state.zone
    if zone is None:
        raise Lost("there is no slice")
    return launch.gcloud.run(launch.calls.ssh(zone, worker, command), stdin, seconds)


def reach(
    launch: Launch,
    worker: int,
    command: str,
    stdin: bytes = b"",
    seconds: float | None = None,
    patience: float | None = None,
) -> str:
    """The same, tried again while the worker does not answer and the slice is there.

    patience: seconds until a worker that does not answer counts as gone. None: as long as a new one may take.

    Raises:
        Lost: the slice is gone, or the worker does not answer.
        Failed: the command failed there.
    """
    until, failures = launch.clock.now() + (launch.timing.ready if patience is None else patience), 0
    while True:
        try:
            return ssh(launch, worker, command, stdin, seconds)
        except GcloudError as error:
            if launch.cancelled.is_set():
                raise Lost("cancelled") from None
            check_there(launch)
            failures += error.kind in (Kind.REMOTE, Kind.PERMISSION)
            if failures == FAILURES:
                raise Failed(f"worker {worker}: {error.text}") from None
            if launch.clock.now() >= until:
                raise Lost(f"worker {worker} does not answer: {error.text}") from None
        launch.sleep(min(PAUSE, launch.timing.poll))


def check_there(launch: Launch) -> None:
    """Check that the slice is there.

    Raises:
        Lost: it is not.
    """
    zone = launch.state.zone
    if zone is None:
        raise Lost("there is no slice")
    with contextlib.suppress(GcloudError):  # Google's service does not answer: nothing is known
        found = look(launch, zone)
        if found.node is None:
            raise Lost(f"the slice in {zone} is gone", preempted=True)
        if found.node in GONE_NODES:
            raise Lost(f"the slice in {zone} is {found.node}", preempted=True)
        if found.request not in (None, "ACTIVE"):
            raise Lost(f"the request in {zone} is {found.request}", preempted=True)


def prepare(launch: Launch, archive: bytes) -> None:
    """Bring the code and its environment to every worker, and see that all have the same versions.

    Raises:
        Lost: the slice is gone.
        Failed: a worker cannot be set up.
    """
    state = launch.state
    launch.enter("setting up", f"sets up {counted(state.hosts, 'worker')}")
    began = time.monotonic()
    each(launch, lambda worker: reach(launch, worker, unpack(state.name), archive))
    workers = list(range(state.hosts))
    if not state.versions:  # the first decides, for all slices to come
        state.versions = _set_up(launch, workers.pop(0))
        launch.save()
    reported = each(launch, lambda worker: _set_up(launch, worker), workers)
    for worker, versions in zip(workers, reported, strict=True):
        if differing := [name for name, version in state.versions.items() if versions.get(name) != version]:
            raise Failed(f"worker {worker} has other versions than the first: {', '.join(differing[:5])}")
    seconds, packages = time.monotonic() - began, len(state.versions)
    launch.say(f"set up: {counted(state.hosts, 'worker')} with the same {packages} packages, in {seconds:.0f} s")


def _set_up(launch: Launch, worker: int) -> dict[str, str]:
    state = launch.state
    wanted = "".join(f"{name}=={version}\n" for name, version in state.versions.items() if name != "python")
    wanted += "# end\n"
    command = on_worker(state.name, "setup.sh", *state.extras, program="bash")
    printed = reach(launch, worker, command, wanted.encode(), launch.timing.setup)
    try:
        versions = json.loads(printed.strip().splitlines()[-1])
        return {str(name): str(version) for name, version in versions.items()}
    except (ValueError, IndexError, AttributeError):
        raise Failed(f"worker {worker}: the set-up did not say what it installed: {printed[-200:]!r}") from None


def start(launch: Launch, patience: float | None = None) -> None:
    """Start the run on every worker where it does not run; it outlives the connection. patience: see `reach`.

    Raises:
        Lost: the slice is gone, or a worker does not answer.
        Failed: it cannot be started.
    """
    state = launch.state
    given = {"environment": state.environment | launch.secrets, "arguments": state.arguments}

    def one(worker: int) -> None:
        more = abandoned(launch) if worker == 0 and not state.keep else {}
        reach(launch, worker, on_worker(state.name, "start.py"), json.dumps(given | more).encode(), None, patience)

    each(launch, one)


def abandoned(launch: Launch) -> dict[str, object]:
    """What the first worker does if nobody looks after it any more: see `on_worker/start.py`."""
    state, now = launch.state, launch.clock.now()
    assert state.zone is not None
    left = [] if state.max_hours is None else [(state.max_hours - state.hours(now)) * 3600]
    if state.max_dollars is not None and state.leases:
        left.append((state.max_dollars - state.dollars(now)) / state.leases[-1].dollars_per_hour * 3600)
    grace = launch.timing.abandoned
    return {
        "delete": launch.calls.delete(state.zone),
        "grace": grace,
        "deadline": now + min(left) if left else None,
    }


def all_run(launch: Launch) -> bool:
    """Whether the run is going on on every worker."""

    def one(worker: int) -> bool:
        try:
            printed = ssh(launch, worker, on_worker(launch.state.name, "follow.py", str(2**62), "0", "1"))
            return bool(json.loads(printed.splitlines()[-1])["status"]["running"])
        except (GcloudError, ValueError, LookupError):
            return False

    return all(each(launch, one))


def stop(launch: Launch) -> list[str]:
    """Ask the run to stop on every worker, and wait until it has saved; returns how each ended."""
    seconds = launch.timing.stop

    def one(worker: int) -> str:
        try:
            command = on_worker(launch.state.name, "stop.py", f"{seconds:g}")
            return ssh(launch, worker, command, seconds=seconds + launch.timing.call).strip()
        except GcloudError as error:
            return f"does not answer ({error.text[:100]})"

    return each(launch, one)


def examine(launch: Launch) -> dict[int, str]:
    """What each worker that answers can tell about why the run hangs: processes, stacks, the end of its log."""

    def one(worker: int) -> str:
        try:
            return launch.masked(
                ssh(launch, worker, on_worker(launch.state.name, "stacks.py"), seconds=launch.timing.stop)
            )
        except GcloudError as error:
            return f"does not answer: {error.text}"

    return dict(enumerate(each(launch, one)))


def follow_call(launch: Launch, worker: int, offset: int, seconds: float) -> list[str]:
    """The call that follows the log of a worker from a byte on."""
    assert launch.state.zone is not None
    words = (str(offset), f"{seconds:g}", f"{launch.timing.heartbeat:g}")
    return launch.calls.ssh(launch.state.zone, worker, on_worker(launch.state.name, "follow.py", *words))


__all__ = ["ON_WORKER", "check_there", "each", "examine", "follow_call", "prepare", "reach", "ssh", "start", "stop"]
