"""Reads an optimised HLO module of the TPU compiler: the cost, source line and memory traffic of each operation.

It parses the text of `to_string()`, because only the text has the compiler's own schedule and estimates
(`estimated_cycles`): `jaxlib`'s `HloModule` gives names of computations, its cost analysis one sum for the module, and XProf
needs a run on a TPU. Only what the report needs is read. What the estimates were measured against: docs/LOG.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

SCOPE = " in "
"""Between module and line in the names that `lines.py` gives to operations. (An `@` would be cut off by the compiler.)"""
BACKWARD = "~"
"""Follows the module's name in the backward pass."""

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
COUNTERS = ("s32", "u32")
"""Types of a loop's counter: ours, and those of the loops into which the partitioner cuts a product and its gathering."""
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](?:4|8|16|32|64))\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_LABEL = re.compile(r"([\w.]*)(~*) in ([\w/]+\.py)_(\d+)")
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type. on_chip: it is in on-chip memory (its layout has S(n)) and not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool
    layout: str

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)

    @property
    def hbm_bytes(self) -> int:
        """Size if it is in HBM, else 0."""
        return 0 if self.on_chip else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One scheduled operation. times: how often it runs in a step (including loops). computation: the one that contains
    it."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operand_names: tuple[str, ...]
    text: str
    computation: str
    is_root: bool
    times: int = 1

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one run; 0 if it has none (kernels, collectives, bookkeeping)."""
        found = _CYCLES.search(self.text)
        return int(found.group(1)) if found else 0

    @property
    def target(self) -> str:
        """A custom call's target, else ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found.group(1) if found else ""

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.target == "tpu_custom_call"

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls (not a loop's condition)."""
        names: list[str] = []
        for one, several in _CALLED.findall(self.text):
            names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
        return tuple(names)

    @property
    def op_name(self) -> str:
        """The metadata's op_name."""
        found = _OP_NAME.search(self.text)
        return found.group(1) if found else ""

    @property
    def source(self) -> str:
        """The metadata's file:line."""
        found = _SOURCE.search(self.text)
        return f"{found.group(1)}:{found.group(2)}" if found else ""

    @property
    def label(self) -> Label:
        """Our module and line."""
        return read_label(self.op_name)

    @property
    def kernel_cost(self) -> tuple[float, float] | None:
        """The (operations, HBM bytes) that a kernel states for one run. None means that it states none."""
        found = _COST.search(self.text)
        if found is None:
            return None
        values = {key: float(value) for key, value in re.findall(r'"(\w+)":\s*"?([\d.e+]+)', found.group(1))}
        return values.get("flops", 0.0), values.get("bytes_accessed", 0.0)


@dataclasses.dataclass(frozen=True)
class Label:
    """Where an operation comes from. module: dotted name, empty outside the model. line: `model/layers.py:31`, or empty."""

    module: str
    line: str
    backward: bool

    def of_layer(self) -> Label:
        """The label without the number of its block: `blocks.*.attention.query`."""
        return dataclasses.replace(self, module=re.sub(r"\.\d+(?=\.|$)", ".*", self.module))

    def __str__(self) -> str:
        module = self.module + (BACKWARD if self.backward else "")
        return f"{module} {self.line}".strip()


def read_label(op_name: str) -> Label:
    """The scope in an op_name; the innermost one if they are nested."""
    found = _LABEL.findall(op_name)
    if not found:
        return Label("", "", False)
    module, backward, file, line = found[-1]
    return Label(module, f"{file}:{line}", bool(backward))


@functools.lru_cache(maxsize=65536)
def arrays(text: str) -> tuple[Array, ...]:
    """Every array type in a piece of HLO text."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in dims.split(",") if size)
        found.append(Array(dtype, shape, "S(" in layout, layout))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _parse(line: str, computation: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    text = match.group(3)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end + 1 :]
    start = rest.index("(")
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start : _closing(rest, start)]))
    return Instruction(
        match.group(2), rest[:start].strip(), arrays(kind), operands, rest, computation, bool(match.group(1))
    )


class Module:
    """A parsed module: its computations, each a list of instructions in the order in which they run."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header.group(2)
                self.computations[name] = {}
                if header.group(1):
                    self.entry = name
            elif name and line.startswith("  "):
                instruction = _parse(line, name)
                if instruction is not None:
                    self.computations[name][instruction.name] = instruction

    def inside(self, computation: str) -> Iterator[Instruction]:
        """Every instruction of a computation and of those that it calls, once each."""
        for instruction in self.computations.get(computation, {}).values():
            yield instruction
            for called in instruction.called:
                yield from self.inside(called)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it uses, in order."""
        around = self.computations[instruction.computation]
        return [around[name] for name in instruction.operand_names if name in around]

    def scheduled(self, computation: str | None = None, times: int = 1) -> Iterator[Instruction]:
        """Every operation that the core runs: the entry's, and those of loops, calls and branches, with their count.

        Instructions within a fusion are part of the fusion. A loop of unknown count counts once.
        """
        for instruction in self.computations.get(computation or self.entry, {}).values():
            yield dataclasses.replace(instruction, times=times)
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                trips = self.trips(instruction) if instruction.opcode == "while" else 1
                inner = times * (trips or 1)
                for called in instruction.called:
                    yield from self.scheduled(called, inner)

    def unknown_loops(self) -> list[Instruction]:
        """Loops of unknown count, whose bodies are counted once."""
        return [i for i in self.scheduled() if i.opcode == "while" and self.trips(i) is None]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop's body runs: by the compiler, or by its condition, `counter < constant`. None means unknown.

        The counter is assumed to start at 0, as in loops of torch_xla, JAX and this package.
        """
        stated = _TRIPS.search(loop.text)
        if stated:
            return int(stated.group(1))
        names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.text))
        inside = list(self.inside(names.get("condition", "")))
        limits = {i.text for i in inside if i.opcode == "constant" and i.results[0].dtype in COUNTERS}
        compares = [i for i in inside if i.opcode == "compare" and re.search("direction=(LT|GT)", i.text)]
        found = re.match(r"constant\((\d+)\)", next(iter(limits))) if len(limits) == len(compares) == 1 else None
        if found is None:
            return None
        counter = next((i for i in inside if i.opcode == "get-tuple-element"), None)
        index = re.search(r"index=(\d+)", counter.text) if counter else None
        step = self._increment(names.get("body", ""), int(index.group(1)) if index else 0)
        return -(-int(found.group(1)) // step)

    def _increment(self, body: str, index: int) -> int:
        """What a body adds to its counter; 1 if that is not found (an unrolled loop adds more)."""
        around = self.computations.get(body, {})
        root = next((i for i in around.values() if i.is_root and i.opcode == "tuple"), None)
        if root is None or index >= len(root.operand_names):
            return 1
        update = around.get(root.operand_names[index])
        if update is None or update.opcode != "add":
            return 1
        steps = [re.match(r"constant\((\d+)\)", operand.text) for operand in self.operands(update)]
        return next((int(step.group(1)) for step in steps if step and int(step.group(1)) > 0), 1)


def aliased_parameters(text: str) -> set[int]:
    """Numbers of the arguments whose memory a result reuses, by the module's first line."""
    return {int(number) for number in re.findall(r"\}: \((\d+), \{\}", text[: text.index("\n")])}
