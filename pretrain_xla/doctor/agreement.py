"""Do all hosts of the run answer, and are they alike? Each host runs the same command, and they meet as a run's hosts do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain_xla.doctor.check import Check, Figures, failed
from pretrain_xla.runtime.hosts import Hosts

ALIKE = ("chip", "local_devices", "config")
"""Facts besides versions in which hosts must not differ."""


def gather_facts(hosts: Hosts, facts: Figures, seconds: float) -> list[Figures]:
    """The facts of all hosts, in their order; every host calls this.

    Raises:
        AnotherFailed: one of them did not answer within `seconds`.
    """
    return hosts.gather(facts, "the doctor's facts", seconds)


def check_hosts(facts: Sequence[Figures], machines: int) -> Check:
    """Whether the hosts are alike, and well.

    Args:
        facts: of each process, in order: `versions` by name, the names of `failed` checks, and those of `ALIKE`.
        machines: hosts of the run.
    """
    count = len(facts)
    faults = []
    for what in sorted({name for one in facts for name in one["versions"]}):
        faults += _differences(what, [one["versions"].get(what, "missing") for one in facts])
    for what in ALIKE:
        faults += _differences(what.replace("_", " "), [one.get(what) for one in facts])
    sick = {index: one["failed"] for index, one in enumerate(facts) if index and one["failed"]}
    faults += [f"process {index} fails {', '.join(names)}" for index, names in sick.items()]
    figures = {"processes": count, "machines": machines, "facts": list(facts), "faults": faults}
    if faults:
        fix = "set up every host alike, from one list of pinned packages and one copy of the code; see each host's own output"
        return failed("hosts", "; ".join(faults), fix, "all alike", **figures)
    alone = "one process, alone" if count == 1 else f"{count} processes on {machines} hosts answer and are alike"
    return Check("hosts", "ok", alone, figures=figures)


def _differences(what: str, values: Sequence[Any]) -> list[str]:
    """A line for each process whose value is not that of most."""
    texts = [str(value) for value in values]
    usual = Counter(texts).most_common(1)[0][0]
    return [
        f"process {index} has {what} {text}, and most have {usual}" for index, text in enumerate(texts) if text != usual
    ]


def local_facts(versions: Mapping[str, str], failures: Sequence[str], **others: Any) -> Figures:
    """What a host says of itself. It names no host, path or user."""
    return {"versions": dict(versions), "failed": list(failures), **others}
