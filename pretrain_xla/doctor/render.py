"""The checks as one table, and as a tree for `--json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.table import Table
from rich.text import Text

from pretrain_xla.doctor.check import Check
from pretrain_xla.redact import redacted_tree

STYLE = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def render(checks: Sequence[Check]) -> Table:
    """A row for each check; below a failed or skipped one, what to do."""
    table = Table(box=rich.box.SIMPLE_HEAD, title="doctor", title_justify="left", title_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("expected", overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n→ {check.fix}", STYLE[check.status])
        table.add_row(check.name, Text(check.status, STYLE[check.status]), found, Text(check.expected))
    return table


def summary(checks: Sequence[Check]) -> Text:
    """How many went well."""
    count = {status: sum(check.status == status for check in checks) for status in STYLE}
    text = f"{count['ok']} ok, {count['failed']} failed, {count['skipped']} not made"
    return Text(text, STYLE["failed" if count["failed"] else "ok"])


def to_tree(checks: Sequence[Check], software: Mapping[str, str], chip: str | None, file: str | None) -> dict[str, Any]:
    """For `--json`."""
    tree = {
        "format": "pretrain_xla doctor",
        "version": 1,
        "ok": all(check.status != "failed" for check in checks),
        "chip": chip,
        "software": dict(software),
        "checks": [dataclasses.asdict(check) for check in checks],
        "calibration": file,
    }
    found: dict[str, Any] = redacted_tree(tree)
    return found
