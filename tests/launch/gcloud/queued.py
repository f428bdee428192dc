"""`gcloud compute tpus queued-resources`: create, describe, list, delete."""

from __future__ import annotations

import re
import time

from . import texts
from .resources import enter
from .state import Record, State, chips, quota_id, quota_used
from .syntax import Call

_REMOVABLE = ("ACCEPTED", "FAILED", "SUSPENDED")


def create(state: State, call: Call, zone: str) -> Record:
    """A new request: checked as far as it is at once, and then queued."""
    name, kind = call.positionals[0], call.values.get("--accelerator-type", "")
    offered = _offers(state, zone)
    if kind not in offered["types"]:
        raise texts.no_such_type(kind, zone)
    if state.queued(zone, name):
        raise texts.already_exists(state.path(zone, "queuedResources", name))
    node = call.values["--node-id"]
    if state.node(zone, node):
        raise texts.already_exists(state.path(zone, "nodes", node))
    model = call.values.get("--provisioning-model", "").replace("_", "-").lower()
    request: Record = {
        "id": name,
        "zone": zone,
        "node": node,
        "type": kind,
        "version": call.values["--runtime-version"],
        "labels": dict(pair.split("=", 1) for pair in call.values.get("--labels", "").split(",") if pair),
        "spot": "--spot" in call.switches or model == "spot",
        "reserved": "--reserved" in call.switches or model == "reservation-bound",
        "flex_start": model == "flex-start",
        "valid_until": _valid_until(state, call),
        "created": state.now,
    }
    if request["flex_start"] and not offered.get("flex_start", False):
        raise texts.operation_failed(texts.no_flex_start(kind, zone))
    _check_quota(state, offered, request)
    if offered["stock_out"] == "refused" and offered["chips"] < chips(kind):
        raise texts.operation_failed(texts.no_capacity(zone))
    state.data["queued"][f"{zone}/{name}"] = request
    enter(state, request, "CREATING", initiator="USER")
    return {"said": f"Create request issued for: [{name}]", "then": f"Created queued resource [{name}]."}


def _offers(state: State, zone: str) -> Record:
    found = state.zone(zone)
    if found is None:
        raise texts.no_such_zone(zone)
    if found.get("denied"):
        raise texts.zone_denied(zone, state.data["account"])
    return found


def _check_quota(state: State, zone: Record, request: Record) -> None:
    quota = quota_id(request)
    limit = zone["quota"].get(quota)
    if quota is None or limit is None or zone["over_quota"] != "refused":
        return
    if quota_used(state, request["zone"], quota) + chips(request["type"]) > limit:
        raise texts.quota_exceeded(quota, limit, request["zone"])


def _valid_until(state: State, call: Call) -> float | None:
    """gcloud sends the interval only if both ends are given (SDK, queued_resources/util.py:SetValidInterval)."""
    seconds = {name: call.values.get(f"--valid-{name}-duration") for name in ("after", "until")}
    if seconds["after"] is None or seconds["until"] is None:
        return None
    return state.now + _duration(seconds["until"])


def _duration(text: str) -> float:
    """Seconds of a duration like 90s, 15m, 1h30m or 2d."""
    if not re.fullmatch(r"(\d+[dhms])+|\d+", text):
        raise texts.Failed(
            f"argument --valid-until-duration: Failed to parse duration: Duration unit must be one of {text}", 2
        )
    units = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "": 1.0}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms]?)", text))


def describe(state: State, call: Call, zone: str) -> Record:
    """One request, as the API shows it."""
    return _shown(state, _find(state, call, zone))


def list_all(state: State, call: Call, zone: str) -> list[Record]:
    """All requests of a zone, in whatever state; `-` stands for all zones."""
    return [_shown(state, one) for one in state.data["queued"].values() if zone in (one["zone"], "-")]


def delete(state: State, call: Call, zone: str) -> Record:
    """Delete a request; with --force its node, too. It takes its time."""
    request = _find(state, call, zone)
    has_node = state.node(zone, request["node"]) is not None
    if "--force" not in call.switches and (has_node or request["state"] not in _REMOVABLE):
        raise texts.has_nodes(state.path(zone, "queuedResources", request["id"]))
    if request["state"] != "DELETING":
        enter(state, request, "DELETING", initiator="USER")
    name = call.positionals[0]
    return {
        "said": f"Delete request issued for: [{name}]",
        "then": f"Deleted queued resource [{name}].",
        "until_gone": ("queued", f"{zone}/{name}"),
    }


def _find(state: State, call: Call, zone: str) -> Record:
    name = call.positionals[0]
    request = state.queued(zone, name)
    if request is None:
        raise texts.not_found(state.path(zone, "queuedResources", name), state.data["account"])
    return request


def _shown(state: State, request: Record) -> Record:
    kept: Record = {
        "name": state.path(request["zone"], "queuedResources", request["id"]),
        "createTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(request["created"])),
        "state": {"state": request["state"], "stateInitiator": request["initiator"]},
        "tpu": {
            "nodeSpec": [
                {
                    "node": {
                        "acceleratorType": request["type"],
                        "runtimeVersion": request["version"],
                        "labels": request["labels"],
                    },
                    "nodeId": request["node"],
                    "parent": f"projects/{state.data['project']}/locations/{request['zone']}",
                }
            ]
        },
    }
    if request["error"]:
        kept["state"]["failedData"] = {"error": request["error"]}
    return kept | ({"spot": {}} if request["spot"] else {})
