"""Communication between devices: the collectives that the compiler inserts, and their time on the interconnect.

Each chip of a group can send `Topology.bandwidth` over its links to the others (the links of the worst placed chip). With the
best known algorithms on rings and tori (Patarasuk & Yuan 2009), a group of n chips sends, for b bytes: 2 (n - 1) / n b in an
all-reduce, (n - 1) / n b in an all-gather, a reduce-scatter or an all-to-all (b: the larger side), b in a permute. The two
cores of a v2 or v3 chip share its links and add up on the chip first. Latency, about a microsecond a hop, is left out.

One published profile to compare with ("How to scale your model", the worked problem on sharded matrices): an all-gather of
34 MB along one dimension of a v5e 4x4 took 680 us; this estimate is 559 us.
"""

from __future__ import annotations

import dataclasses
import re

from pretrain_xla.preflight.hlo import Instruction, Module
from pretrain_xla.preflight.topology import Topology

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and group size, over a step.

    bytes: sum for one device. exposed: seconds that no computation hides.
    """

    kind: str
    group: int
    count: int
    bytes: int
    seconds: float
    exposed: float
    dtypes: tuple[str, ...]


def find_collectives(module: Module, topology: Topology) -> tuple[Collective, ...]:
    """Every collective of a step, by kind and group, the longest first."""
    found: dict[tuple[str, int], list[tuple[int, int, float, float, set[str]]]] = {}
    times = {instruction.computation: instruction.times for instruction in module.scheduled()}
    for name, count in times.items():
        idle = 0.0  # when the links become idle: overlapping collectives share the computation that hides them
        for one in _runs(module, name):
            kind = _kind(one.instruction.opcode)
            assert kind is not None
            group = group_size(one.instruction.text, topology.devices)
            size = _bytes(module, one.instruction, kind)
            seconds = transfer_seconds(kind, group, size, topology)
            begun, ended = one.begun / topology.chip.clock, one.ended / topology.chip.clock
            hidden = min(seconds, max(0.0, ended - max(begun, idle)))
            idle = max(begun, idle) + hidden
            types = {array.dtype for array in one.instruction.results}
            row = (count, count * size, count * seconds, count * (seconds - hidden), types)
            found.setdefault((kind, group), []).append(row)
    rows = [
        Collective(
            kind,
            group,
            sum(part[0] for part in parts),
            sum(part[1] for part in parts),
            sum(part[2] for part in parts),
            sum(part[3] for part in parts),
            tuple(sorted(set().union(*(part[4] for part in parts)))),
        )
        for (kind, group), parts in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def transfer_seconds(kind: str, group: int, size: int, topology: Topology) -> float:
    """Time of one collective on the interconnect; see the module."""
    chips = max(1, group // topology.chip.devices_per_chip)
    bandwidth = topology.bandwidth(chips)
    if chips == 1 or not bandwidth:
        return 0.0
    share = {"all-reduce": 2 * (chips - 1) / chips, "collective-permute": 1.0, "collective-broadcast": 1.0}
    sent = share.get(kind, (chips - 1) / chips) * size
    # Two cores add up on the chip before it sends, but each gathers and scatters separately.
    cores = 1 if kind == "all-reduce" else topology.chip.devices_per_chip
    return sent * cores / bandwidth


def group_size(text: str, devices: int) -> int:
    """Devices in a group, from `replica_groups=[2,4]<=[8]` or `{{0,1},{2,3}}`; all devices if it is empty."""
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if tiled:
        return int(tiled.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(listed.group(1).split(",")) if listed else devices


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def _collectives_in(module: Module, instruction: Instruction) -> list[Instruction]:
    """The collectives of an operation: itself, or those within a fusion."""
    if _kind(instruction.opcode):
        return [instruction]
    if instruction.opcode != "fusion":
        return []
    return [i for called in instruction.called for i in module.inside(called) if _kind(i.opcode)]


def _bytes(module: Module, instruction: Instruction, kind: str) -> int:
    operands = sum(array.bytes for operand in module.operands(instruction) for array in operand.results)
    results = sum(array.bytes for array in instruction.results)
    if instruction.opcode.endswith("-start"):
        # The result of a start includes the operands, except for an all-reduce.
        results = results if kind == "all-reduce" else max(0, results - operands)
    return operands if kind in ("all-reduce", "collective-permute") else max(operands, results)


@dataclasses.dataclass
class _Run:
    """A collective in a schedule. begun, ended: cycles of other work that are scheduled before its start and its end."""

    instruction: Instruction
    begun: int
    ended: int


def _runs(module: Module, computation: str) -> list[_Run]:
    """The collectives of one computation, in the order of their starts.

    An asynchronous one is a start and a done, or a chain of fusions that all contain it under one channel: one starts it, some
    compute meanwhile, and one ends it.
    """
    runs: dict[str, _Run] = {}
    elapsed = 0
    for instruction in module.computations.get(computation, {}).values():
        for inner in _collectives_in(module, instruction):
            channel = re.search(r"channel_id=(\d+)", inner.text)
            in_chain = instruction.opcode == "fusion" and channel is not None
            key = f"channel {channel.group(1)}" if in_chain and channel else instruction.name
            runs.setdefault(key, _Run(inner, elapsed, elapsed)).ended = elapsed
        if instruction.opcode.endswith("-done"):
            for operand in instruction.operand_names:
                if operand in runs:
                    runs[operand].ended = elapsed
        elapsed += instruction.cycles
    return list(runs.values())
