"""What the stand-in knows, in one JSON file below its folder, behind a lock.

A queued resource and a node are plain dictionaries with gcloud's names for their states. Times are seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

QUOTA_IDS = {
    "v4": "TPUV4s{}PodPerProjectPerZoneForTPUAPI",
    "v5litepod": "TPUV5s{}LitepodPerProjectPerZoneForTPUAPI",
    "v6e": "TPUV6E{}PerProjectPerZoneForTPUAPI",
}
"""marin-community/marin issue 87 and pull request 1612, with "Preemptible" for spot."""
SERVING = "TPUV5s{}LitepodServingPerProjectPerZoneForTPUAPI"
"""Of v5litepod with one host: marin-community/marin pull request 6198."""
SECONDS = {"CREATING": 0.05, "ACCEPTED": 0.05, "PROVISIONING": 0.1, "SUSPENDING": 0.1, "DELETING": 0.1}
"""How long a queued resource stays in a state, unless the zone says otherwise."""


class State:
    """The state while it is held: a dictionary `data`, written back at the end."""

    def __init__(self, folder: Path, data: Record) -> None:
        self.folder, self.data = folder, data
        self.now = time.time()

    def zone(self, name: str) -> Record | None:
        zones: Record = self.data["zones"]
        found: Record | None = zones.get(name)
        return found

    def queued(self, zone: str, name: str) -> Record | None:
        found: Record | None = self.data["queued"].get(f"{zone}/{name}")
        return found

    def node(self, zone: str, name: str) -> Record | None:
        found: Record | None = self.data["nodes"].get(f"{zone}/{name}")
        return found

    def path(self, zone: str, kind: str, name: str) -> str:
        """The full name of a resource."""
        return f"projects/{self.data['project']}/locations/{zone}/{kind}/{name}"

    def machine(self, node: Record, worker: int) -> Path:
        """The folder of one worker; its `home` is the worker's home."""
        return self.folder / "machines" / f"{node['ordinal']}_{node['id']}" / f"w{worker}"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[State]:
    """The state, which no other process can read or write meanwhile."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "state.json"
        before = path.read_text()
        state = State(folder, json.loads(before))
        yield state
        after = json.dumps(state.data, indent=1)
        if after != before:
            part = folder / "state.json.part"
            part.write_text(after)
            os.replace(part, path)


def new_zone(*types: str, **changes: Any) -> Record:
    """A zone that offers these types.

    `chips`: how many are free to give; `quota`: limits by quota id; `stock_out`: what a request meets when there are no chips:
    "waits" in the queue, "fails" after a while in it, or "refused" at once; `over_quota`: "refused" or "fails"; `seconds`: how
    long a request stays in a state; `latency`: seconds that each call takes; `denied`: the organization does not allow it.
    """
    zone = {"types": [*types], "chips": 1024, "quota": {}, "stock_out": "waits", "over_quota": "refused", "seconds": {}}
    assert not {*changes} - {*zone, "latency", "denied"}, changes
    return zone | changes


def new_state(zones: Record) -> Record:
    """A project with these zones, a bucket `bucket`, and an account that is logged in."""
    return {
        "account": "someone@example.com",
        "login_has_run_out": False,
        "project": "a-project",
        "zones": zones,
        "queued": {},
        "nodes": {},
        "buckets": {"bucket": "US-WEST4"},
        "ssh_agent": True,
        "ssh_retry": 0.1,
        "log": "*/run.log",
        "worker_environment": {},
        "ordinal": 0,
        "calls": {},
        "entered": {},
        "events": [],
        "due": [],
        "launchers": [],
    }


def chips(accelerator_type: str) -> int:
    """Chips of a type: its number counts cores up to v5p, and chips for v5litepod and v6e."""
    generation, _, number = accelerator_type.rpartition("-")
    return int(number) if generation in ("v5litepod", "v6e") else int(number) // 2


def hosts(accelerator_type: str) -> int:
    """Workers of a type: a host has up to eight chips of one slice of v5litepod or v6e, else four."""
    generation, _, _ = accelerator_type.rpartition("-")
    count = chips(accelerator_type)
    return 1 if generation in ("v5litepod", "v6e") and count <= 8 else max(count // 4, 1)


def quota_id(request: Record) -> str | None:
    """The quota that a request counts against; None where we know of none."""
    generation = request["type"].rpartition("-")[0]
    single = generation == "v5litepod" and hosts(request["type"]) == 1
    pattern = SERVING if single else QUOTA_IDS.get(generation)
    return pattern.format("Preemptible" if request["spot"] else "") if pattern else None


def quota_used(state: State, zone: str, quota: str) -> int:
    """Chips that count against a quota. Requests that FAILED or are SUSPENDED count until they are deleted (marin issue 87)."""
    return sum(
        chips(one["type"]) for one in state.data["queued"].values() if one["zone"] == zone and quota_id(one) == quota
    )
