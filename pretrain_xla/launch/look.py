"""`launch status`, `logs`, `stop` and `ssh`: looking after a run that was launched, from any terminal."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence

from pretrain_xla.command_line import Parser
from pretrain_xla.errors import UserError
from pretrain_xla.launch import state as states
from pretrain_xla.launch.acquire import look
from pretrain_xla.launch.bucket import open_bucket
from pretrain_xla.launch.calls import Calls, Network
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.context import Launch, Lost
from pretrain_xla.launch.finish import clean_up, copy_back, stop_run
from pretrain_xla.launch.gcloud import Gcloud, GcloudError
from pretrain_xla.launch.progress import progress_line
from pretrain_xla.launch.request import PROGRAM
from pretrain_xla.launch.state import ENDED, State
from pretrain_xla.launch.timing import timing
from pretrain_xla.launch.workers import follow_call

COMMANDS = ("status", "logs", "stop", "ssh")
PATIENCE = 900.0


def look_command(arguments: Sequence[str]) -> int:
    """One of `COMMANDS` with its arguments; returns the exit status.

    Raises:
        UserError: there is no such run.
    """
    command, *rest = arguments
    parser = Parser(f"{PROGRAM} {command}", description=_DESCRIPTIONS[command], allow_abbrev=False)
    parser.add_argument("name", nargs="?" if command == "status" else None, help="name of the run")
    parser.add_argument("--bucket", help="its folder in a bucket, if it was launched from another machine")
    if command in ("logs", "ssh"):
        parser.add_argument("--worker", type=int, default=0, metavar="N", help="worker (default: 0)")
    if command == "status":
        parser.add_argument("--json", action="store_true", help="print only a JSON document to stdout")
    flags = parser.parse_args(rest)
    if flags.name is None and flags.bucket is None:
        return _list()
    launch = opened(flags.name, flags.bucket)
    if command == "status":
        return _status(launch, flags.json)
    if command == "stop":
        return _stop(launch)
    zone = launch.state.zone
    if zone is None:
        raise UserError(
            f"{launch.state.name} has no slice now ({launch.state.phase}): its log is in {launch.local}/launch"
        )
    if command == "ssh":
        return launch.gcloud.here(launch.calls.ssh(zone, flags.worker, None))
    return _logs(launch, flags.worker)


_DESCRIPTIONS = {
    "status": "How a launched run is: phase, progress, cost, what there is of it in its zones. Without a name: all runs.",
    "logs": "Follow the log of a worker, until Ctrl-C; the run does not notice.",
    "stop": "Let a run save and stop, copy its records, delete its slice. The launch's command continues it later.",
    "ssh": "A terminal on a worker.",
}


def opened(name: str | None, bucket: str | None) -> Launch:
    """A launch whose state is known here or in a bucket.

    Raises:
        UserError: it is not known.
    """
    clock, times = Clock(), timing()
    gcloud = Gcloud(clock, times)
    name = name or (bucket or "").rstrip("/").rpartition("/")[2]
    here = states.read_local(name)
    url = bucket or (here.bucket if here else None)
    if url is None:
        raise UserError(
            f"no run {name} was launched from this machine ({states.folder()}): name its folder with --bucket"
        )
    url = f"file://{url}" if url.startswith("/") else url.rstrip("/")
    project = here.project if here else None
    state = states.newest(name, open_bucket(url, gcloud, Calls(name, project)))
    if state is None:
        raise UserError(f"{url} has no {states.FILE}: no run was launched with that --bucket")
    calls = Calls(state.name, state.project, Network(**state.network))
    files = open_bucket(url, gcloud, calls)
    secrets = {variable: os.environ.get(variable, "") for variable in state.secrets}
    return Launch(
        state, calls, gcloud, files, clock, times, secrets, lambda line: print(line, flush=True), f"runs/{state.name}"
    )


def _list() -> int:
    folder = states.folder()
    names = sorted(name[:-5] for name in os.listdir(folder) if name.endswith(".json")) if os.path.isdir(folder) else []
    if not names:
        print(f"no runs were launched from this machine ({folder})")
    for name in names:
        state = states.read_local(name)
        assert state is not None
        print(summary(state, time.time()))
    return 0


def summary(state: State, now: float) -> str:
    """One line on a run."""
    where = f" in {state.zone}" if state.zone else ""
    cost = f"{state.hours(now):.2f} h, ${state.dollars(now):.2f}"
    step = f", step {state.progress['step']:,}/{state.progress['steps']:,}" if state.progress else ""
    return f"{state.name}: {state.phase}{where}, {state.topology} {state.tier}, {cost}{step}" + (
        f" ({state.message})" if state.message and state.message != state.phase else ""
    )


def _status(launch: Launch, as_json: bool) -> int:
    state, now = launch.state, launch.clock.now()
    there = {}
    for zone in dict.fromkeys([*state.zones, *(lease.zone for lease in state.leases)]):
        try:
            found = look(launch, zone)
            there[zone] = {"request": found.request, "node": found.node}
        except GcloudError as error:
            there[zone] = {"error": error.text}
    if as_json:
        tree = json.loads(state.to_json()) | {
            "zones_now": there,
            "hours": state.hours(now),
            "dollars": state.dollars(now),
        }
        print(json.dumps(tree, indent=2))
        return 0
    print(summary(state, now))
    if state.progress:
        print(progress_line(state, int(state.progress.get("tokens_per_step", 0)), now))
    for zone, what in there.items():
        print(f"{zone}: " + (", ".join(f"{key} {value}" for key, value in what.items() if value) or "nothing"))
    age = now - state.holder_seen
    if state.phase not in ENDED:
        print(f"looked after by {state.holder}, {age:.0f} s ago")
        if age > launch.timing.lease:
            print(f"nobody looks after it now: give the launch's command again, or {PROGRAM} stop {state.name}")
    return 0


def _logs(launch: Launch, worker: int) -> int:
    offset = 0
    while True:
        try:
            for line in launch.gcloud.lines(
                follow_call(launch, worker, offset, launch.timing.follow), launch.timing.silence
            ):
                try:
                    tree = json.loads(line)
                except ValueError:
                    continue
                if "log" in tree:
                    if tree["begin"] != offset:  # gcloud ran the command again when its connection dropped
                        break
                    offset = tree["offset"]
                    print(launch.masked(tree["log"]), end="", flush=True)
                elif "status" in tree and not tree["status"]["running"]:
                    return 0
        except GcloudError as error:
            launch.say(f"the connection ended ({error.text[:200]}); another is opened")
            launch.clock.sleep(launch.timing.retry)
            if look(launch, launch.state.zone or "").nothing:
                raise UserError(f"the slice of {launch.state.name} is gone") from None


def _stop(launch: Launch) -> int:
    """Let the launcher on this machine do it, if there is one, else do it here."""
    name = launch.state.name
    try:
        with states.alone(name):
            states.check_free(launch.state, launch.clock.now(), launch.timing.lease)
            for step in (lambda: stop_run(launch), lambda: copy_back(launch, model=False)):
                try:
                    step()
                except (GcloudError, UserError, Lost) as error:
                    launch.say(f"warning: {error}")
            clean_up(launch)
            if launch.state.phase not in ENDED:
                launch.enter("stopped", "stopped by `launch stop`")
            return 0
    except states.LookedAfter as error:
        if error.process is None:
            raise
        process = error.process
    launch.say(f"asks process {process}, which looks after {name}, to stop it")
    os.kill(process, signal.SIGINT)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        state = states.read_local(name)
        if state is not None and state.phase in ENDED:
            print(summary(state, time.time()))
            return 0
        time.sleep(0.5)
    raise UserError(f"process {process} has not stopped {name} within {PATIENCE:.0f} s: look there")
