"""The list of events: which have happened, and what is due then. `events.py` says what they look like."""

from __future__ import annotations

from .state import Record, State


def entered(state: State, request: Record, name: str) -> None:
    """A request has come into a state."""
    for event in waiting(state, "state"):
        if event["after"]["state"] == name:
            happened(state, event)


def called(state: State, command: str, arguments: list[str], ended: bool) -> None:
    """A call begins, or has ended."""
    for event in waiting(state, "call"):
        after = event["after"]
        worker = f"--worker={after['worker']}" if "worker" in after else ""
        is_it = command.endswith(after["call"]) and after.get("ended", False) == ended
        if is_it and all(any(text in one for one in arguments) for text in (after.get("holding", ""), worker) if text):
            happened(state, event)


def waiting(state: State, kind: str) -> list[Record]:
    """Events of a kind that have not happened."""
    return [event for event in state.data["events"] if kind in event["after"] and not event.get("done")]


def happened(state: State, event: Record) -> None:
    """Count it; the last time that is needed, what it does becomes due."""
    event["count"] = event.get("count", 0) + 1
    if event["count"] == event["after"].get("times", 1):
        event["done"] = True
        state.data["due"].append({"at": state.now + event["after"].get("seconds", 0.0), "do": event["do"]})
