"""The end of a launch: what the run has written is copied back, its slice is deleted, nothing is left that costs money."""

from __future__ import annotations

import os

from pretrain_xla.errors import UserError
from pretrain_xla.launch.acquire import remove, sweep
from pretrain_xla.launch.calls import shown
from pretrain_xla.launch.context import Launch
from pretrain_xla.launch.gcloud import GcloudError
from pretrain_xla.launch.watch import append
from pretrain_xla.launch.workers import examine, stop

CHECKPOINTS, RECORDS = "checkpoints", "checkpoints/records"


def stop_run(launch: Launch) -> None:
    """Stop the run on its workers, after a checkpoint, if there are any."""
    if launch.state.zone is not None and launch.state.phase == "running":
        launch.say(f"asks the run to save and stop (at most {launch.timing.stop:.0f} s)")
        launch.say("; ".join(f"worker {worker}: {how}" for worker, how in enumerate(stop(launch))))


def collect(launch: Launch, why: str) -> None:
    """Keep what the workers can tell about why the slice was of no use, here and in the bucket."""
    launch.say(f"collects what the workers can tell, in {launch.local}/launch and {launch.bucket.url}/logs")
    for worker, text in examine(launch).items():
        name = f"attempt_{launch.state.attempt}_worker_{worker}.txt"
        append(os.path.join(launch.local, "launch", name), f"{why}\n{text}\n")
        try:
            launch.bucket.write(f"logs/{name}", f"{why}\n{text}\n".encode())
        except UserError as error:
            launch.say(f"warning: {error}")


def copy_back(launch: Launch, model: bool) -> None:
    """Copy the run's records, and its last checkpoint if `model`, to this machine; the bucket keeps them."""
    launch.bucket.download(RECORDS, launch.local)
    if model:
        folder = f"step_{launch.state.progress.get('steps', launch.steps):08d}"
        launch.bucket.download(f"{CHECKPOINTS}/{folder}", os.path.join(launch.local, CHECKPOINTS, folder))
    log = os.path.join(launch.local, "launch", f"log_{launch.state.attempt}.txt")
    if os.path.exists(log):
        with open(log, "rb") as file:
            launch.bucket.write(f"logs/log_{launch.state.attempt}.txt", file.read())


def clean_up(launch: Launch) -> None:
    """Delete the slice, and see in every zone that nothing of this run is left.

    Raises:
        UserError: something is left.
    """
    state = launch.state
    if state.zone is not None:
        launch.say(f"deletes the slice in {state.zone}")
        remove(launch, state.zone)
    zones = ", ".join(dict.fromkeys([*state.zones, *(lease.zone for lease in state.leases)]))
    try:
        left = sweep(launch)
    except GcloudError as error:
        raise UserError(f"whether something of {state.name} is left in {zones} is not known: {error.text}") from None
    for zone in left:
        launch.say(f"{zone}: something of this run was left, and is deleted now")
    launch.say(f"nothing of {state.name} is left in {zones}")


def leftovers(launch: Launch) -> str:
    """What to do by hand about a slice that may be left."""
    zones = [launch.state.zone] if launch.state.zone else launch.state.zones
    return "; ".join(shown(launch.calls.delete(zone)) for zone in zones)
