"""How far a run is, what it has cost and will cost, in one line."""

from __future__ import annotations

import math

from pretrain_xla.launch.state import State


def amount(count: float) -> str:
    """A number in three digits: 950, 104k, 1.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def counted(count: int, noun: str) -> str:
    """`1 host`, `4 hosts`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def hours_to_go(state: State, tokens_per_step: int) -> float | None:
    """Hours until the last step, at the present rate. None means that there is no rate yet."""
    row = state.progress
    rate = row.get("tokens_per_second")
    if not rate or not tokens_per_step or not math.isfinite(rate):
        return None
    return max(row["steps"] - row["step"], 0) * tokens_per_step / rate / 3600


def progress_line(state: State, tokens_per_step: int, now: float) -> str:
    """The line."""
    row = state.progress
    parts = [f"step {row['step']:,}/{row['steps']:,}"]
    if isinstance(row.get("loss"), float | int):
        parts.append(f"loss {row['loss']:.4f}")
    if row.get("tokens_per_second"):
        parts.append(f"{amount(row['tokens_per_second'])} tokens/s")
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.0%}")
    parts.append(f"{state.hours(now):.2f} h and ${state.dollars(now):.2f} so far")
    left = hours_to_go(state, tokens_per_step)
    if left is not None and state.leases:
        parts.append(f"{left:.2f} h and ${left * state.leases[-1].dollars_per_hour:.2f} to go")
    return ", ".join(parts)
