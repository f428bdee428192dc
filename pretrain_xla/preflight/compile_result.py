"""The worker's result: the compiler's figures and the step's inputs, as plain values.

Neither torch_xla nor JAX is imported here: the process that reports does not load them.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of the step. kind: `parameter`, `optimizer`, `batch` or `other`. device_bytes: one device's share.

    sharded: whether the mesh splits it. aliased: whether its memory is reused for the value that replaces it.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    device_bytes: int
    sharded: bool
    aliased: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one device's program, in bytes. bytes_accessed includes on-chip traffic."""

    hlo_text: str
    flops: float
    bytes_accessed: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """HBM that the step needs on one device."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A large buffer that the compiler names when memory runs out. unpadded_bytes: without the layout's padding."""

    bytes: int
    unpadded_bytes: int
    shape: str
    where: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Shortage:
    """The compiler's refusal. needed: minimum bytes on one device; largest: allocations, if listed; message: its text."""

    needed: int
    limit: int
    largest: tuple[Allocation, ...]
    message: str


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """A finished compilation. Exactly one of compiled and shortage is not None. Times in seconds.

    detours: one line on tensors that the compiler cannot reshard directly. None means that there are none.
    """

    compiled: Compiled | None
    shortage: Shortage | None
    inputs: tuple[Input, ...]
    mesh: dict[str, int]
    trace_seconds: float
    compile_seconds: float
    libtpu: str
    detours: str | None = None

    def to_tree(self) -> dict[str, Any]:
        """As values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> CompileResult:
        """The inverse of `to_tree`, after JSON has turned tuples into lists."""
        compiled, shortage = tree["compiled"], tree["shortage"]
        if shortage:
            shortage = shortage | {"largest": tuple(Allocation(**item) for item in shortage["largest"])}
        inputs = tuple(Input(**(item | {"shape": tuple(item["shape"])})) for item in tree["inputs"])
        return cls(
            **(
                tree
                | {
                    "compiled": Compiled(**compiled) if compiled else None,
                    "shortage": Shortage(**shortage) if shortage else None,
                    "inputs": inputs,
                }
            )
        )
