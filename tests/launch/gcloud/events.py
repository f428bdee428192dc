"""What goes wrong, and when: a list in the state, each as `{"after": {…}, "do": {…}}`. Each is done once.

`after` is one of

    {"state": "ACTIVE"}                       a request has come into this state
    {"call": "tpu-vm ssh", "holding": "x"}    a call begins whose command ends so and whose arguments hold this text
    {"step": 30}                              the run on the newest node has logged this step (`log`: in which files)
    {"file": "NAME"}                          a file is in the home of the newest node's `worker`

with, as is needed, `times` (how often it must happen; 1), `seconds` (wait so long after it), `worker`, and `ended` for a call
(it happens when the call has ended). `do` is one of

    {"preempt": "PREEMPTED"}      the newest node goes, with this state; "GONE": it is not found any more, "READY": nothing
                                  says so
    {"fail": {"code": 13, …}}     the newest request FAILED
    {"suspend": true}             the newest request is suspended
    {"drop": 1}                   the connections to this worker end
    {"unreachable": 1}            they end, and no new ones come for `for` seconds
    {"reboot": 1}                 all that runs on this worker is killed
    {"freeze": 1}                 all that runs on this worker is stopped (SIGSTOP)
    {"touch": "NAME"}             a file appears in the home of the `worker`
    {"signal": "SIGINT"}          those who launch (`launchers` in the state) receive a signal
    {"set": {…}}                  changes of the state, as `{"account": null}` or `{"zones": {"us-west4-a": {"chips": 16}}}`
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from . import machines
from .resources import enter, power_off
from .schedule import happened, waiting
from .state import Record, State


def run_due(state: State) -> bool:
    """Do what is due by now; returns whether anything was."""
    for event in waiting(state, "step"):
        if _last_step(state, event["after"].get("worker", 0)) >= event["after"]["step"]:
            happened(state, event)
    for event in waiting(state, "file"):
        node = newest_node(state)
        if (
            node is not None
            and (state.machine(node, event["after"].get("worker", 0)) / "home" / event["after"]["file"]).exists()
        ):
            happened(state, event)
    due = [one for one in state.data["due"] if one["at"] <= state.now]
    state.data["due"] = [one for one in state.data["due"] if one["at"] > state.now]
    for one in due:
        _do(state, one["do"])
    return bool(due)


def newest_node(state: State) -> Record | None:
    """The node that was made last, if any is there."""
    return max(state.data["nodes"].values(), key=lambda node: node["ordinal"], default=None)


def _last_step(state: State, worker: int) -> int:
    node = newest_node(state)
    if node is None:
        return -1
    home = state.machine(node, worker) / "home"
    text = "".join(path.read_text(errors="replace") for path in home.glob(state.data["log"]))
    return max(map(int, re.findall(r"^step +(\d+)/", text, re.MULTILINE)), default=-1)


def _do(state: State, action: Record) -> None:
    if "signal" in action:
        for pid in state.data["launchers"]:
            os.kill(pid, signal.Signals[action["signal"]])
    elif "set" in action:
        _merge(state.data, action["set"])
    elif "fail" in action:
        enter(state, _newest_request(state), "FAILED", action["fail"])
    elif "suspend" in action:
        enter(state, _newest_request(state), "SUSPENDING")
    else:
        node = newest_node(state)
        assert node is not None, f"no node for {action}"
        if "preempt" in action:
            _preempt(state, node, action["preempt"])
        else:
            _harm(state, node, action)


def _harm(state: State, node: Record, action: Record) -> None:
    kind = next(kind for kind in ("drop", "unreachable", "reboot", "freeze", "touch") if kind in action)
    worker = action.get("worker", 0) if kind == "touch" else action[kind]
    machine = state.machine(node, worker)
    if kind == "drop":
        machines.drop(machine)
    elif kind == "unreachable":
        machines.make_unreachable(machine, action["for"])
    elif kind == "reboot":
        machines.kill(machine)
    elif kind == "freeze":
        machines.signal_all(machine, signal.SIGSTOP)
    else:
        Path(machine / "home" / action["touch"]).touch()


def _preempt(state: State, node: Record, shown: str) -> None:
    """The machines go at once. The node keeps its name; its request is suspended by the service."""
    power_off(state, node)
    node["state"] = shown
    if shown == "GONE":
        del state.data["nodes"][f"{node['zone']}/{node['id']}"]
    request = state.queued(node["zone"], node["queued"])
    if request is not None and shown != "READY":
        enter(state, request, "SUSPENDING")


def _newest_request(state: State) -> Record:
    newest: Record = max(state.data["queued"].values(), key=lambda one: one["created"])
    return newest


def _merge(into: Record, changes: Record) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
