"""What the environment says about this process: alone, or one of several started by torchrun or another launcher.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together. A shell may hold some of them, set for another
program. That is not a launch: without RANK they are ignored, with a note, and RANK without the others is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain_xla.errors import UserError

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
ALONE = "unset {names} to run alone, or start with torchrun, which sets them"


@dataclass(frozen=True)
class Launched:
    """One process of a launch. distributed: whether there is a launch. note: a line for the user. None means no note."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    distributed: bool = False
    note: str | None = None

    @property
    def hosts(self) -> int:
        """Hosts of the launch."""
        return max(self.world_size // self.local_world_size, 1)


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """Read the environment, for the torch runtime.

    Raises:
        UserError: RANK is set, and the others are missing or do not fit.
    """
    if "RANK" not in environment:
        left = [f"{name}={environment[name]}" for name in ("WORLD_SIZE", *LOCAL) if name in environment]
        ignored = f"{', '.join(left)} in the environment without RANK: ignored, this process runs alone"
        return Launched(note=ignored if left else None)
    how = ALONE.format(names=" ".join(name for name in (*RENDEZVOUS, *LOCAL) if name in environment))
    missing = [name for name in RENDEZVOUS if name not in environment]
    if missing:
        raise UserError(f"RANK={environment['RANK']} is in the environment, and {', '.join(missing)} not: {how}")
    rank, world_size = (_number(environment, name, how) for name in ("RANK", "WORLD_SIZE"))
    _number(environment, "MASTER_PORT", how)
    local_rank = _number(environment, "LOCAL_RANK", how, default=0)
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", how, default=world_size)
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not one of WORLD_SIZE={world_size} processes: {how}")
    note = None
    if world_size > 1 and "TORCHELASTIC_RUN_ID" not in environment:
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        note = (
            f"RANK={rank} and WORLD_SIZE={world_size} are in the environment: waiting for the other processes at {where}; "
            f"unset {' '.join(RENDEZVOUS)} to run alone"
        )
    return Launched(rank, world_size, local_rank, max(local_world_size, 1), distributed=True, note=note)


def speaks_first(runtime: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints and checks before the devices are open and determine which process is main.

    XLA on a TPU or a CPU knows its processes by itself: there RANK means nothing.
    """
    if runtime == "xla" and environment.get("PJRT_DEVICE") != "CUDA":
        return True
    return environment.get("RANK", "0") == "0"


def _number(environment: Mapping[str, str], name: str, how: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a number: {how}")
    return int(text)
