"""What happens to a request and its node: a state is entered, a node is made, switched off, removed."""

from __future__ import annotations

from . import machines, schedule
from .state import Record, State, hosts


def enter(state: State, request: Record, name: str, error: Record | None = None, initiator: str = "SERVICE") -> None:
    """Put a request into a state."""
    request.update(state=name, since=state.now, error=error, initiator=initiator)
    schedule.entered(state, request, name)


def make_node(state: State, request: Record) -> None:
    """A node with its workers, which cannot be used before it is READY."""
    state.data["ordinal"] += 1
    node = {
        "id": request["node"],
        "zone": request["zone"],
        "type": request["type"],
        "version": request["version"],
        "labels": request["labels"],
        "spot": request["spot"],
        "queued": request["id"],
        "state": "CREATING",
        "workers": hosts(request["type"]),
        "ordinal": state.data["ordinal"],
    }
    state.data["nodes"][f"{request['zone']}/{request['node']}"] = node
    for worker in range(node["workers"]):
        (state.machine(node, worker) / "home").mkdir(parents=True)


def remove_node(state: State, request: Record) -> None:
    """Delete the node of a request, and kill what runs on it. Its disk's contents are kept, for tests to look at."""
    node = state.data["nodes"].pop(f"{request['zone']}/{request['node']}", None)
    if node is not None:
        power_off(state, node)


def power_off(state: State, node: Record) -> None:
    """Kill what runs on a node, and let nothing start on it any more."""
    for worker in range(node["workers"]):
        machine = state.machine(node, worker)
        machines.make_unreachable(machine, 1e9)
        machines.kill(machine)
