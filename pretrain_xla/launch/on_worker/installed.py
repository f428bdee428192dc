"""Whether the packages that lists of requirements name are installed: installed.py LIST ... -- [PACKAGE ...]

Prints JSON, package → version of all that is installed, and `python`. Exits with 1, and a line on stderr, if one is missing or
has another version than its list demands with `==`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

OWN = "pretrain-xla"


def plain(name: str) -> str:
    """The name in the form in which all spellings are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions() -> dict[str, str]:
    """Package → version of all that is installed, without this one."""
    found = {
        plain(one.metadata["Name"]): one.version for one in importlib.metadata.distributions() if one.metadata["Name"]
    }
    found.pop(OWN, None)
    return dict(sorted(found.items()))


def missing(lines: list[str], have: dict[str, str]) -> list[str]:
    """What is not as the lines of a list demand."""
    lacking = []
    for line in lines:
        match = re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*(?:==\s*([\w.+!-]+))?", line.split("#")[0].strip())
        if match is None:  # a comment, or -r another list
            continue
        name, version = plain(match[1]), match[2]
        if name not in have:
            lacking.append(f"{name} is not installed")
        elif version and have[name] != version and have[name].split("+")[0] != version:
            lacking.append(f"{name} is {have[name]}, and not {version}")
    return lacking


def main(arguments: list[str]) -> int:
    """The command line."""
    cut = arguments.index("--")
    lists, extras = arguments[:cut], arguments[cut + 1 :]
    lines = list(extras)
    for path in lists:
        with open(path, encoding="utf-8") as file:
            lines += file.read().splitlines()
    have = versions()
    lacking = missing(lines, have)
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        lacking.append(f"Python is {sys.version.split()[0]}, and not 3.11 to 3.13")
    if lacking:
        print("; ".join(lacking[:5]), file=sys.stderr)
        return 1
    print(json.dumps({"python": ".".join(map(str, sys.version_info[:2])), **have}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
