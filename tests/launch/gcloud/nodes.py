"""`gcloud compute tpus tpu-vm`: describe, list, delete."""

from __future__ import annotations

from . import texts
from .resources import enter, power_off
from .state import Record, State
from .syntax import Call


def find(state: State, name: str, zone: str) -> Record:
    """A node by name.

    Raises:
        Failed: there is none.
    """
    node = state.node(zone, name)
    if node is None:
        raise texts.not_found(state.path(zone, "nodes", name), state.data["account"])
    return node


def address(node: Record, worker: int) -> str:
    """The external address of a worker."""
    return f"34.0.{node['ordinal']}.{worker + 1}"


def describe(state: State, call: Call, zone: str) -> Record:
    """One node, as the API shows it."""
    return _shown(state, find(state, call.positionals[0], zone))


def list_all(state: State, call: Call, zone: str) -> list[Record]:
    """All nodes of a zone; `-` stands for all zones."""
    return [_shown(state, one) for one in state.data["nodes"].values() if zone in (one["zone"], "-")]


def delete(state: State, call: Call, zone: str) -> Record:
    """Delete a node. Its queued resource is suspended then, and stays until it is deleted, too."""
    name = call.positionals[0]
    node = find(state, name, zone)
    power_off(state, node)
    del state.data["nodes"][f"{zone}/{name}"]
    request = state.queued(zone, node["queued"])
    if request is not None and request["state"] in ("PROVISIONING", "ACTIVE"):
        enter(state, request, "SUSPENDING", initiator="USER")
    return {"said": f"Delete request issued for: [{name}]", "then": f"Deleted tpu [{name}]."}


def _shown(state: State, node: Record) -> Record:
    return {
        "name": state.path(node["zone"], "nodes", node["id"]),
        "acceleratorType": node["type"],
        "acceleratorConfig": {"type": node["type"].rpartition("-")[0].upper()},
        "apiVersion": "V2",
        "health": "HEALTHY",
        "labels": node["labels"],
        "networkEndpoints": [
            {"accessConfig": {"externalIp": address(node, worker)}, "ipAddress": f"10.0.0.{worker + 2}", "port": 8470}
            for worker in range(node["workers"])
        ],
        "queuedResource": state.path(node["zone"], "queuedResources", node["queued"]),
        "runtimeVersion": node["version"],
        "schedulingConfig": {"spot": True} if node["spot"] else {},
        "state": node["state"],
    }
