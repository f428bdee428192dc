"""What gcloud knows of the account and the project, the types and images of a zone, and quotas."""

from __future__ import annotations

from . import texts
from .state import Record, State
from .syntax import Call

RUNTIMES = ("tpu-ubuntu2204-base", "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv6e")


def configuration(state: State, call: Call, zone: str) -> Record:
    """`config list`: what is set; an account that is not there has no key."""
    core = {name: state.data[name] for name in ("account", "project") if state.data[name]}
    return {"core": core | {"disable_usage_reporting": "True"}}


def value(state: State, call: Call, zone: str) -> str:
    """`config get-value`."""
    name = call.positionals[0].removeprefix("core/")
    if name not in ("account", "project"):
        raise texts.Failed(f"Section [core] has no property [{name}].")
    return state.data[name] or "(unset)"


def accounts(state: State, call: Call, zone: str) -> list[Record]:
    """`auth list`."""
    return [{"account": state.data["account"], "status": "ACTIVE"}] if state.data["account"] else []


def locations(state: State, call: Call, zone: str) -> list[Record]:
    """Zones with TPUs."""
    return [
        {"locationId": name, "name": f"projects/{state.data['project']}/locations/{name}"}
        for name in sorted(state.data["zones"])
    ]


def types(state: State, call: Call, zone: str) -> list[Record]:
    """Types of a zone."""
    return [
        {"name": state.path(zone, "acceleratorTypes", kind), "type": kind}
        for kind in sorted(_zone(state, zone)["types"])
    ]


def one_type(state: State, call: Call, zone: str) -> Record:
    """One type of a zone."""
    for found in types(state, call, zone):
        if found["type"] == call.positionals[0]:
            return found
    raise texts.not_found(state.path(zone, "acceleratorTypes", call.positionals[0]), state.data["account"])


def images(state: State, call: Call, zone: str) -> list[Record]:
    """Runtime images of a zone."""
    _zone(state, zone)
    return [{"name": state.path(zone, "runtimeVersions", name), "version": name} for name in RUNTIMES]


def one_image(state: State, call: Call, zone: str) -> Record:
    """One runtime image of a zone."""
    for found in images(state, call, zone):
        if found["version"] == call.positionals[0]:
            return found
    raise texts.not_found(state.path(zone, "runtimeVersions", call.positionals[0]), state.data["account"])


def one_quota(state: State, call: Call, zone: str) -> Record:
    """`quotas info describe`: the limit of a quota in each zone that has one of its own."""
    name = call.positionals[0]
    limits = {place: one["quota"][name] for place, one in state.data["zones"].items() if name in one["quota"]}
    if not limits:
        raise texts.not_found(
            f"projects/{state.data['project']}/locations/global/services/tpu.googleapis.com/quotaInfos/{name}",
            state.data["account"],
        )
    return {
        "dimensions": ["zone"],
        "dimensionsInfos": [
            {"applicableLocations": [place], "details": {"value": str(limit)}, "dimensions": {"zone": place}}
            for place, limit in limits.items()
        ],
        "name": f"projects/{state.data['project']}/locations/global/services/tpu.googleapis.com/quotaInfos/{name}",
        "quotaId": name,
        "service": "tpu.googleapis.com",
    }


def _zone(state: State, zone: str) -> Record:
    found = state.zone(zone)
    if found is None or found.get("denied"):
        raise texts.zone_denied(zone, state.data["account"])
    return found
