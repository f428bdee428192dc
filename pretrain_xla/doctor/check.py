"""One line of the result: what was looked at, what was found, and what to do if it is not as it should be."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Check:
    """A finished check.

    found: what was seen, in a few words. expected: what the table or the estimate says. fix: what to do; a failed check always
    has one, and a skipped one says how to have it made. figures: plain values for `--json`.
    """

    name: str
    status: Status
    found: str
    expected: str = ""
    fix: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.fix or self.status == "ok", f"{self.name} says nothing of what to do"


Figures = dict[str, Any]
"""Plain values by name: numbers, texts, lists and dicts of these. Seconds, bytes and operations, not multiples of them."""


def failed(name: str, found: str, fix: str, expected: str = "", /, **figures: Any) -> Check:
    """A check that failed."""
    return Check(name, "failed", found, expected, fix, figures)


def skipped(name: str, why: str, fix: str) -> Check:
    """A check that was not made."""
    return Check(name, "skipped", why, fix=fix)
