"""A launch from its first slice to its last: get one, set it up, start, watch; and again, until the run is done.

Whatever ends it (done, failed, the budget, Ctrl-C), the slice is deleted, unless `--keep` was given. A second Ctrl-C does not
wait for the run to save. While the slice is deleted, the first one is answered by a line; the next leaves at once, and says
what is left.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain_xla.errors import UserError
from pretrain_xla.launch.acquire import acquire, adopt, remove
from pretrain_xla.launch.context import Failed, Launch, Lost, Spent
from pretrain_xla.launch.finish import clean_up, collect, copy_back, leftovers, stop_run
from pretrain_xla.launch.gcloud import GcloudError
from pretrain_xla.launch.progress import counted
from pretrain_xla.launch.watch import Watch
from pretrain_xla.launch.workers import all_run, prepare, start

FRUITLESS = 5
"""Slices in a row that were lost without a new step, and not to preemption, after which a launch gives up."""
STATUS = {"done": 0, "failed": 1, "spent": 3, "stopped": 128 + signal.SIGINT}


def run(launch: Launch, archive: bytes, *, fresh: bool, model: bool) -> int:
    """Launch, or take over; returns the exit status.

    Args:
        launch: see `Launch`.
        archive: the code.
        fresh: whether nothing of this run can be there yet.
        model: copy the last checkpoint back, too.

    Raises:
        UserError: something of the run may be left and cost money, with what to do.
    """
    with _signals(), launch.heartbeat():
        try:
            try:
                _until_done(launch, archive, fresh)
                phase, message = "done", "done"
            except Spent as error:
                phase, message = "spent", str(error)
            except KeyboardInterrupt:
                phase, message = "stopped", "stopped by Ctrl-C or SIGTERM"
            except (Failed, UserError) as error:
                phase, message = "failed", str(error)
            except GcloudError as error:
                phase, message = "failed", f"gcloud: {error.text}"
            return _wind_down(launch, phase, message, model)
        except (KeyboardInterrupt, UserError):
            launch.print(f"what may be left, and cost money: {leftovers(launch)}")
            raise


def _until_done(launch: Launch, archive: bytes, fresh: bool) -> None:
    state, fruitless, reached = launch.state, 0, launch.state.progress.get("step", -1)
    has_slice = not fresh and adopt(launch)
    goes_on = has_slice and all_run(launch)
    while True:
        try:
            if not has_slice:
                acquire(launch)
            if not goes_on:
                prepare(launch, archive)
                start(launch)
            launch.enter("running", f"runs in {state.zone}")
            launch.say(
                f"the run {'goes on' if goes_on else 'has started'} on {counted(state.hosts, 'worker')} in {state.zone}"
            )
            Watch(launch).until_done()
            return
        except Lost as error:
            further = state.progress.get("step", -1) > reached
            reached = max(reached, state.progress.get("step", -1))
            fruitless = 0 if error.preempted or further else fruitless + 1
            launch.say(str(error))
            if not error.preempted and state.zone is not None:
                collect(launch, str(error))
            if fruitless >= FRUITLESS:
                raise Failed(f"{fruitless} slices in a row were lost without a new step; the last: {error}") from None
            if state.zone is not None:
                remove(launch, state.zone)
            has_slice = goes_on = False
            launch.check_budget()


def _wind_down(launch: Launch, phase: str, message: str, model: bool) -> int:
    """Stop what runs, copy back, delete, write down how it ended."""
    state = launch.state
    launch.say(message)
    steps: list[Callable[[], None]] = [
        lambda: stop_run(launch) if phase != "done" else None,
        lambda: copy_back(launch, model and phase == "done"),
    ]
    for step in steps:
        try:
            step()
        except KeyboardInterrupt:
            launch.say("does not wait")
            phase = "stopped" if phase == "done" else phase
            break
        except (GcloudError, UserError, Lost, Failed) as error:
            launch.say(f"warning: {error}")
    if state.keep and state.zone is not None:
        cost = state.leases[-1].dollars_per_hour if state.leases else 0.0
        launch.say(
            f"--keep: the slice in {state.zone} is kept, and costs ${cost:.2f} an hour until: {leftovers(launch)}"
        )
    else:
        _clean_up(launch)
    launch.enter(phase, message)
    now = launch.clock.now()
    launch.say(
        f"{state.hours(now):.2f} h, ${state.dollars(now):.2f}, {counted(len(state.leases), 'slice')}; records: {launch.local}"
    )
    return STATUS[phase]


def _clean_up(launch: Launch) -> None:
    """Delete the slice; Ctrl-C ends that only the second time."""
    try:
        clean_up(launch)
    except KeyboardInterrupt:
        launch.say("deletes the slice first; Ctrl-C again leaves at once")
        clean_up(launch)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM as Ctrl-C. A closed terminal (SIGHUP) ends the launcher alone, and another can take over."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
