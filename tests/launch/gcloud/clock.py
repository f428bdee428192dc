"""Lets time pass: requests move through their states, and what the list of events says is done when it is due.

Called before each call is answered, and by a thread of the tests (`world.py`) between calls.
"""

from __future__ import annotations

from . import events, texts
from .resources import enter, make_node, remove_node
from .state import SECONDS, Record, State, chips, quota_id, quota_used

_HOLDING = ("PROVISIONING", "ACTIVE", "SUSPENDING")


def advance(state: State) -> None:
    """Do all that is due by now."""
    changed = True
    while changed:
        changed = events.run_due(state)
        for request in list(state.data["queued"].values()):
            changed |= _move(state, request)


def _move(state: State, request: Record) -> bool:
    """Let a request take its next step, if it is due."""
    zone = state.zone(request["zone"]) or {}
    seconds = {**SECONDS, **zone.get("seconds", {})}
    now, name = request["state"], request["id"]
    waited = state.now - request["since"]
    if now == "WAITING_FOR_RESOURCES":
        return _leave_queue(state, request, zone, waited, seconds)
    if now not in SECONDS or waited < seconds[now]:
        return False
    if now == "CREATING":
        quota, limit = quota_id(request), zone["quota"].get(quota_id(request))
        if quota and limit is not None and quota_used(state, request["zone"], quota) > limit:
            enter(state, request, "FAILED", texts.quota_exhausted(quota, limit, request["zone"]))
            return True
        enter(state, request, "ACCEPTED")
    elif now == "ACCEPTED":
        enter(state, request, "WAITING_FOR_RESOURCES")
    elif now == "PROVISIONING":
        node = state.node(request["zone"], request["node"])
        if node is not None:
            node["state"] = "READY"
        enter(state, request, "ACTIVE")
    elif now == "SUSPENDING":
        remove_node(state, request)
        enter(state, request, "SUSPENDED", initiator=request["initiator"])
    elif now == "DELETING":
        remove_node(state, request)
        del state.data["queued"][f"{request['zone']}/{name}"]
    return True


def _leave_queue(state: State, request: Record, zone: Record, waited: float, seconds: Record) -> bool:
    taken = sum(
        chips(one["type"])
        for one in state.data["queued"].values()
        if one["zone"] == request["zone"] and one["state"] in _HOLDING
    )
    if waited < seconds.get("WAITING_FOR_RESOURCES", 0.0):
        return False
    if zone["chips"] - taken >= chips(request["type"]):
        make_node(state, request)
        enter(state, request, "PROVISIONING")
    elif request["valid_until"] is not None and state.now > request["valid_until"]:
        enter(state, request, "FAILED", texts.expired())
    elif zone["stock_out"] == "fails":
        enter(
            state,
            request,
            "FAILED",
            texts.no_reserved_capacity() if request["reserved"] else texts.no_capacity(request["zone"]),
        )
    else:
        return False
    return True
