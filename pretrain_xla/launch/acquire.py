"""Gets a slice: asks one zone after the other, waits with growing pauses, and never holds two.

A request or slice that FAILED, was SUSPENDED or PREEMPTED keeps its name and its quota until it is deleted. So it is deleted,
and seen to be gone, before another is asked for.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.launch.calls import shown
from pretrain_xla.launch.context import Launch
from pretrain_xla.launch.gcloud import GcloudError, Kind, classify
from pretrain_xla.launch.slices import resolve_slice
from pretrain_xla.launch.state import Lease

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
ACTIVE = "ACTIVE"
GONE_NODES = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING")
DELETE_PATIENCE = 40
"""Looks at something that is being deleted before the user is asked for help."""


@dataclass(frozen=True)
class Found:
    """What there is of a run in a zone. None means that there is no request, or no node."""

    request: str | None
    node: str | None
    hosts: int = 0
    why: str = ""
    """What Google says about a request that failed."""

    @property
    def nothing(self) -> bool:
        """Whether there is nothing that keeps a name, quota or money."""
        return self.request is None and self.node is None


def look(launch: Launch, zone: str) -> Found:
    """What there is of the run in a zone."""
    request = _described(launch, launch.calls.request(zone))
    node = _described(launch, launch.calls.node(zone))
    state, why = _state_of(request)
    node_state, _ = _state_of(node)
    return Found(state, node_state, len((node or {}).get("networkEndpoints") or ()), why)


def _described(launch: Launch, call: list[str]) -> dict[str, Any] | None:
    try:
        found = launch.gcloud.json(call)
    except GcloudError as error:
        if error.kind in (Kind.NOT_FOUND, Kind.NOT_OFFERED):
            return None
        raise
    return found if isinstance(found, dict) else {}


def _state_of(tree: dict[str, Any] | None) -> tuple[str | None, str]:
    if tree is None:
        return None, ""
    state = tree.get("state", "STATE_UNSPECIFIED")
    if not isinstance(state, dict):
        return str(state), ""
    failed = state.get("failedData") or {}
    error = failed.get("error") or {} if isinstance(failed, dict) else {}
    return str(state.get("state", "STATE_UNSPECIFIED")), str(error.get("message", "")) if isinstance(
        error, dict
    ) else ""


def remove(launch: Launch, zone: str) -> None:
    """Delete what there is of the run in a zone, and see that it is gone.

    Raises:
        UserError: it does not go away.
    """
    for _ in range(DELETE_PATIENCE):
        with contextlib.suppress(GcloudError):
            found = look(launch, zone)
            if found.nothing:
                _end_lease(launch, zone)
                return
            if found.request not in (None, "DELETING"):
                _try(launch, launch.calls.delete(zone))
            elif found.request is None and found.node != "DELETING":
                _try(launch, launch.calls.delete_node(zone))
            else:
                launch.clock.sleep(launch.timing.poll)
            continue
        launch.clock.sleep(launch.timing.poll)
    raise UserError(
        f"{launch.state.name} in {zone} does not go away, and may cost money: look at the console, or run "
        f"{shown(launch.calls.delete(zone))}"
    )


def _try(launch: Launch, call: list[str]) -> None:
    try:
        launch.gcloud.run(call, seconds=3 * launch.timing.call)
    except GcloudError as error:
        if error.kind is not Kind.NOT_FOUND:
            launch.say(f"could not be deleted yet: {error.text}")
            launch.clock.sleep(launch.timing.poll)


def _end_lease(launch: Launch, zone: str) -> None:
    for lease in launch.state.leases:
        if lease.zone == zone and lease.until is None:
            lease.until = launch.clock.now()
    if launch.state.zone == zone:
        launch.state.zone = None
    launch.save()


def adopt(launch: Launch) -> bool:
    """Take over the slice that an earlier launcher of this run has got or asked for; what is dead or too many is deleted."""
    state, kept = launch.state, None
    for zone in dict.fromkeys([*([state.zone] if state.zone else []), *state.zones]):
        found = look(launch, zone)
        alive = found.request in (*WAITING, ACTIVE) and found.node not in GONE_NODES
        if alive and kept is None:
            kept = zone
        elif not found.nothing:
            launch.say(f"{zone}: a {found.request or found.node} leftover of this run is deleted")
            remove(launch, zone)
        else:
            _end_lease(launch, zone)
    if kept is None:
        return False
    state.zone = kept
    launch.say(f"{kept}: takes over what an earlier launcher asked for")
    if (why := _wait(launch, kept)) is None:
        return True
    launch.say(f"{kept}: {why}")
    remove(launch, kept)
    return False


def acquire(launch: Launch) -> None:
    """Get a slice, in whichever zone has one first.

    Raises:
        UserError: no zone can ever give one.
        Spent: the budget is spent.
    """
    state, timing = launch.state, launch.timing
    zones, pause, refused = list(state.zones), timing.first_backoff, dict[str, str]()
    while zones:
        for zone in tuple(zones):
            launch.check_budget()
            state.attempt, state.offset = state.attempt + 1, 0
            why, forever = _ask(launch, zone)
            if why is None:
                return
            launch.say(f"{zone}: {why}")
            remove(launch, zone)
            if forever:
                zones.remove(zone)
                refused[zone] = why
        if zones:
            launch.say(f"no zone has a {state.topology} now; asks again in {pause:.0f} s")
            launch.sleep(pause)
            pause = min(2 * pause, timing.longest_backoff)
    reasons = "; ".join(f"{zone}: {why}" for zone, why in refused.items())
    raise UserError(f"no zone can give a {state.topology}: {reasons}: name other zones with --zone, or fix that")


def _ask(launch: Launch, zone: str) -> tuple[str | None, bool]:
    """Ask one zone; returns why it has none (None: it has), and whether asking again is of no use."""
    state, timing = launch.state, launch.timing
    wanted = resolve_slice(state.topology)
    wait = timing.zone_wait if len(state.zones) > 1 else timing.only_zone_wait
    longest = (
        None if state.max_hours is None else max(state.max_hours * 3600 - state.hours(launch.clock.now()) * 3600, 600)
    )
    state.zone = zone
    launch.enter("acquiring", f"asks {zone}")
    launch.say(f"{zone}: asks for {wanted.accelerator_type} ({state.tier})")
    call = launch.calls.create(zone, wanted.accelerator_type, wanted.runtime_version, state.tier, wait, longest)
    try:
        launch.gcloud.run(call, seconds=3 * timing.call)
    except GcloudError as error:
        if error.kind not in (Kind.EXISTS, Kind.TRANSIENT):
            return error.text, _is_final(error.kind, error.text, wanted.chips)
        launch.say(f"{zone}: {error.text}")
    if (why := _wait(launch, zone, wait)) is None:
        return None, False
    return why, _is_final(classify(why), why, wanted.chips)


def _is_final(kind: Kind, text: str, chips: int) -> bool:
    if kind is Kind.QUOTA:  # a limit that is used up by others, or by what is being deleted, may be free later
        limit = re.search(r"limit:? (\d+)", text, re.IGNORECASE)
        return limit is not None and int(limit[1]) < chips
    return kind in (Kind.NOT_OFFERED, Kind.PERMISSION)


def _wait(launch: Launch, zone: str, wait: float | None = None) -> str | None:
    """Wait until the slice that was asked for is ready; returns why it will not be."""
    timing, state = launch.timing, launch.state
    until = launch.clock.now() + (timing.only_zone_wait if wait is None else wait)
    said, missed = "", 0
    while True:
        found = look(launch, zone)
        what = f"{found.request}, node {found.node}" if found.node else str(found.request)
        if what != said and not found.nothing:
            launch.say(f"{zone}: {what}")
            said = what
        missed = missed + 1 if found.request is None else 0
        if missed > 1:
            return "the request is gone"
        if found.request == ACTIVE:
            if not any(lease.until is None for lease in state.leases):
                _begin_lease(launch, zone)
                until = launch.clock.now() + timing.ready
            if found.node == "READY":
                state.hosts = found.hosts or state.hosts
                launch.save()
                return None
            if found.node in GONE_NODES:
                return f"the slice is {found.node}"
        elif found.request is not None and found.request not in WAITING:
            return found.why or f"the request is {found.request}"
        if launch.clock.now() >= until:
            return f"no slice within the time for one zone ({found.request})"
        launch.sleep(timing.poll)


def _begin_lease(launch: Launch, zone: str) -> None:
    state = launch.state
    wanted = resolve_slice(state.topology)
    given = state.price_per_chip_hour
    price = wanted.price(zone) if given is None else given * wanted.chips
    state.leases.append(Lease(zone, launch.clock.now(), None, price))
    launch.save()


def sweep(launch: Launch) -> list[str]:
    """Look through all zones for what is left of the run, and delete it; returns what was found there."""
    left = []
    for zone in dict.fromkeys([*launch.state.zones, *(lease.zone for lease in launch.state.leases)]):
        for call in (launch.calls.requests(zone), launch.calls.nodes(zone)):
            listed = launch.gcloud.json(call)
            names = (
                [str(one.get("name", "")) for one in listed if isinstance(one, dict)]
                if isinstance(listed, list)
                else []
            )
            if any(name.rpartition("/")[2] == launch.state.name for name in names):
                left.append(zone)
                remove(launch, zone)
                break
    return left
