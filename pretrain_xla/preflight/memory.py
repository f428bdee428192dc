"""Where a device's HBM goes.

The sizes of the step's inputs follow exactly from the sharding table; the total is the compiler's. The difference is the
temporaries: gradients, activations kept for the backward pass, and scratch. The compiler's schedule shows which of them are
alive at the peak.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from pretrain_xla.preflight.compile_result import CompileResult
from pretrain_xla.preflight.hlo import Instruction, Label, Module, read_label
from pretrain_xla.preflight.topology import Topology

SAME_MEMORY = frozenset(("bitcast", "get-tuple-element", "tuple", "while", "opt-barrier"))


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Equal buffers. where: module and line. count: how many at once."""

    bytes: int
    count: int
    shape: str
    where: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. padding: what layouts add to the inputs. outputs: results that do not reuse an input's memory.

    total: by the compiler; if it refuses the step, the minimum that it says it needs.
    """

    fits: bool
    parameters: int
    optimizer: int
    batch: int
    other: int
    padding: int
    temporaries: int
    outputs: int
    code: int
    total: int
    capacity: int
    hbm: int
    largest: tuple[Buffer, ...]
    not_donated: tuple[str, ...]


def read_memory(result: CompileResult, module: Module | None, topology: Topology) -> Memory:
    """The memory of a compilation, whether it fitted or not."""
    by_kind = Counter({"parameter": 0, "optimizer": 0, "batch": 0, "other": 0})
    for item in result.inputs:
        by_kind[item.kind] += item.device_bytes
    inputs = sum(by_kind.values())
    compiled, shortage = result.compiled, result.shortage
    if compiled is not None:
        padding = max(0, compiled.argument_bytes - inputs)
        temporaries, code = compiled.temp_bytes, compiled.code_bytes
        outputs, total = max(0, compiled.output_bytes - compiled.alias_bytes), compiled.total_bytes
        largest = _alive_at_peak(module) if module else ()
    else:
        assert shortage is not None
        # A single buffer larger than the memory is refused before the rest is counted.
        padding, outputs, code = 0, 0, 0
        total = max(shortage.needed, inputs)
        temporaries = total - inputs
        largest = _named(result)
    kept = ("parameter", "optimizer")
    return Memory(
        fits=compiled is not None,
        parameters=by_kind["parameter"],
        optimizer=by_kind["optimizer"],
        batch=by_kind["batch"],
        other=by_kind["other"],
        padding=padding,
        temporaries=temporaries,
        outputs=outputs,
        code=code,
        total=total,
        capacity=topology.chip.usable_hbm if shortage is None else shortage.limit,
        hbm=topology.chip.hbm_bytes,
        largest=largest,
        not_donated=tuple(item.name for item in result.inputs if item.kind in kept and not item.aliased),
    )


def _named(result: CompileResult) -> tuple[Buffer, ...]:
    assert result.shortage is not None
    groups: Counter[tuple[int, str, str]] = Counter()
    for allocation in result.shortage.largest:
        where = str(read_label(allocation.where).of_layer()) or allocation.where or allocation.kind
        groups[(allocation.bytes, allocation.shape.split("{")[0], where)] += 1
    return tuple(Buffer(size * count, count, shape, where) for (size, shape, where), count in groups.items())


def _alive_at_peak(module: Module, most: int = 6) -> tuple[Buffer, ...]:
    """The largest groups of temporaries alive at the peak of HBM use, by the entry's schedule."""
    order = list(module.computations[module.entry].values())
    owner: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, instruction in enumerate(order):
        shares = instruction.opcode in SAME_MEMORY or instruction.opcode.endswith("-done")
        source = instruction.operand_names[0] if instruction.operand_names else ""
        owner[instruction.name] = owner.get(source, source) if shares and source else instruction.name
        for name in instruction.operand_names:
            last[owner.get(name, name)] = index
    ends: dict[int, list[Instruction]] = {}
    alive: dict[str, Instruction] = {}
    size = peak = 0
    at_peak: list[Instruction] = []
    for index, instruction in enumerate(order):
        if owner[instruction.name] == instruction.name and instruction.opcode not in ("parameter", "constant"):
            end = last.get(instruction.name, index)
            # Values that become results are written over a donated input.
            if end < len(order) - 1 and _hbm(instruction):
                alive[instruction.name] = instruction
                ends.setdefault(end, []).append(instruction)
                size += _hbm(instruction)
        if size > peak:
            peak, at_peak = size, list(alive.values())
        for ended in ends.pop(index, ()):
            size -= _hbm(ended)
            del alive[ended.name]
    groups: dict[tuple[str, str], list[int]] = {}
    for instruction in at_peak:
        where = str(_origin(module, instruction)) or instruction.opcode
        shape = max(instruction.results, key=lambda array: array.hbm_bytes)
        groups.setdefault((str(shape), where), []).append(_hbm(instruction))
    rows = [Buffer(sum(sizes), len(sizes), shape, where) for (shape, where), sizes in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes)[:most])


def _origin(module: Module, instruction: Instruction) -> Label:
    """Where a buffer's value comes from; for a copy, where the copied value comes from."""
    for _ in range(4):
        if instruction.label.line:
            break
        operands = module.operands(instruction)
        if not operands or not instruction.opcode.startswith(("copy", "bitcast", "get-tuple-element", "slice")):
            break
        instruction = operands[0]
    return instruction.label.of_layer()


def _hbm(instruction: Instruction) -> int:
    results = instruction.results
    if instruction.opcode.endswith("-start"):
        results = results[1:2] if instruction.opcode.endswith("slice-start") else results[:1]
    return sum(array.hbm_bytes for array in results)
