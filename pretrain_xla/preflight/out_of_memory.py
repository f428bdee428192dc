"""Reads the TPU compiler's refusal: how much memory was needed, and by what.

The message is meant for people, so every part of it is optional here: an unknown wording costs details, never the verdict.
"""

from __future__ import annotations

import re

from pretrain_xla.preflight.compile_result import Allocation, Shortage

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGTB]?)"
_TOTAL = re.compile(rf"Total hbm usage >= {_SIZE}")
_RESERVED = re.compile(rf"reserved\s+{_SIZE}")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_ONE = re.compile(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)")
_ONE_SHAPE = re.compile(r"\[shape = '([^']*)'")
_ENTRY = re.compile(rf"^\s*\d+\. Size: {_SIZE}$(.*?)(?=^\s*=+\s*$|\Z)", re.MULTILINE | re.DOTALL)


def is_out_of_memory(message: str) -> bool:
    """Whether a compiler error says that the program does not fit into HBM."""
    return "RESOURCE_EXHAUSTED" in message and ("hbm" in message.lower())


def read_shortage(message: str, usable_hbm: int) -> Shortage:
    """The compiler's message in figures (bytes of one device)."""
    one = _ONE.search(message)
    if one is not None:
        shape = _ONE_SHAPE.search(message)
        size = int(one.group(1))
        allocation = Allocation(size, size, shape.group(1) if shape else "", "", "temporary")
        return Shortage(size, usable_hbm, (allocation,), message)
    used, total, reserved = _USED.search(message), _TOTAL.search(message), _RESERVED.search(message)
    needed = 0
    if used:
        needed = _bytes(used.group(1), used.group(2))
    elif total:
        needed = _bytes(*total.groups()) - (_bytes(*reserved.groups()) if reserved else 0)
    limit = _bytes(used.group(3), used.group(4)) if used else usable_hbm
    return Shortage(needed, limit, tuple(_allocation(entry) for entry in _ENTRY.finditer(message)), message)


def _allocation(entry: re.Match[str]) -> Allocation:
    body = entry.group(3)
    size = _bytes(entry.group(1), entry.group(2))
    unpadded = re.search(rf"Unpadded size: {_SIZE}", body)
    return Allocation(
        size,
        _bytes(*unpadded.groups()) if unpadded else size,
        _field(r"Shape: (\S+)", body),
        _field(r'op_name="((?:[^"\\]|\\.)*)"', body),
        _field(r"Allocation type: (.*)", body).strip(),
    )


def _field(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
