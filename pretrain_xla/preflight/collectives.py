"""Communication between devices: what the compiler put in, and how long it takes on the interconnect.

Each chip can send `Topology.chip_bandwidth` over all its links together (those of the worst placed chip). With the best known
algorithms on rings and tori (Patarasuk & Yuan 2009), a group of n chips sends, for b bytes: 2 (n - 1) / n b in an all-reduce,
(n - 1) / n b in an all-gather, a reduce-scatter or an all-to-all (b: the larger side), b in a permute. The two cores of a v2 or
v3 chip share its links and add up on the chip first. Latency, about a microsecond a hop, is left out.
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

    bytes: of one device, summed. exposed: seconds that no computation hides.
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
    hidden = _hidden_seconds(module, topology)
    for instruction in module.scheduled():
        for inner in _collectives_in(module, instruction):
            kind = _kind(inner.opcode)
            assert kind is not None
            group = group_size(inner.text, topology.devices)
            size = _bytes(module, inner, kind)
            seconds = transfer_seconds(kind, group, size, topology)
            exposed = max(0.0, seconds - hidden.get((instruction.computation, instruction.name), 0.0))
            types = {array.dtype for array in inner.results}
            times = instruction.times
            found.setdefault((kind, group), []).append((times, times * size, times * seconds, times * exposed, types))
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
    """Time of one collective on the interconnect; see the module for the rule."""
    chips = max(1, group // topology.chip.devices_per_chip)
    if chips == 1 or not topology.chip_bandwidth:
        return 0.0
    share = {"all-reduce": 2 * (chips - 1) / chips, "collective-permute": 1.0, "collective-broadcast": 1.0}
    sent = share.get(kind, (chips - 1) / chips) * size
    # Two cores add up on the chip before it sends, but gather and scatter each for itself.
    cores = 1 if kind == "all-reduce" else topology.chip.devices_per_chip
    return sent * cores / topology.chip_bandwidth


def group_size(text: str, devices: int) -> int:
    """Devices that take part together, from `replica_groups=[2,4]<=[8]` or `{{0,1},{2,3}}`; all of them when it is empty."""
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if tiled:
        return int(tiled.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(listed.group(1).split(",")) if listed else devices


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def _collectives_in(module: Module, instruction: Instruction) -> list[Instruction]:
    """The collectives that an operation stands for: itself, or those that a fusion holds."""
    if _kind(instruction.opcode):
        return [instruction]
    if instruction.opcode != "fusion":
        return []
    return [i for called in instruction.called for i in module.inside(called) if _kind(i.opcode)]


def _bytes(module: Module, instruction: Instruction, kind: str) -> int:
    operands = sum(array.bytes for operand in module.operands(instruction) for array in operand.results)
    results = sum(array.bytes for array in instruction.results)
    if instruction.opcode.endswith("-start"):
        # The result of a start names the operands again, except an all-reduce's.
        results = results if kind == "all-reduce" else max(0, results - operands)
    return operands if kind in ("all-reduce", "collective-permute") else max(operands, results)


def _hidden_seconds(module: Module, topology: Topology) -> dict[tuple[str, str], float]:
    """(computation, start) → seconds of other work that the schedule puts between an asynchronous start and its end."""
    hidden: dict[tuple[str, str], float] = {}
    for name in {instruction.computation for instruction in module.scheduled()} | {module.entry}:
        begun: dict[str, int] = {}
        elapsed = 0
        for instruction in module.computations.get(name, {}).values():
            if instruction.opcode.endswith("-start") or _starts_collective(module, instruction):
                begun[instruction.name] = elapsed
            elif instruction.opcode.endswith("-done") or "async_collective" in instruction.name:
                for operand in instruction.operand_names:
                    if operand in begun:
                        hidden[(name, operand)] = (elapsed - begun.pop(operand)) / topology.chip.clock
            elapsed += instruction.cycles
    return hidden


def _starts_collective(module: Module, instruction: Instruction) -> bool:
    """Whether it is one of libtpu's fusions that start a collective and go on computing."""
    return instruction.opcode == "fusion" and "start" in instruction.name and bool(_collectives_in(module, instruction))
