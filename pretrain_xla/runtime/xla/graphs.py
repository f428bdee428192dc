"""Recompilations and host transfers, by source line.

With lazy tensors two faults are easy to make, and silent. A Python value or a shape that changes between steps ends up in the
traced graph, and the step is recompiled (minutes on a TPU). Reading a tensor on the host (`.item()`, `if tensor:`) splits the
graph and stops the device. `HostTransferWatch` records transfers: a `TorchFunctionMode` that sees each call from Python, at
about a microsecond a call, hidden behind the device. `CompiledFunction` finds recompilations by the runtime's counters around
each step, traces the recompiled graph once more with source lines, and compares it with the graph of the first call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretrain_xla.runtime.base import GraphEvent
from pretrain_xla.runtime.source_line import source_line

# Calls that read a tensor's values on the host: each waits for the device.
_READS = frozenset(
    {
        *("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
        *("equal", "allclose", "is_nonzero", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
        *("__array__", "__repr__", "__format__", "__contains__"),
    }
)


def _reads_device(name: str, arguments: Sequence[Any], keywords: dict[str, Any] | None) -> bool:
    if name == "to":
        targets = [*arguments[1:], *(keywords or {}).values()]
        if not any(str(target) == "cpu" for target in targets if isinstance(target, str | torch.device)):
            return False
    elif name not in _READS:
        return False
    return any(isinstance(a, Tensor) and a.device.type == "xla" for a in arguments)


class HostTransferWatch(TorchFunctionMode):
    """Records the line of each call, made by this thread, that reads an XLA tensor on the host."""

    def __init__(self, record: Callable[[GraphEvent], None]) -> None:
        super().__init__()
        self._record = record
        self.paused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not self.paused and _reads_device(name, args, kwargs):
            self._record(GraphEvent("host transfer", source_line(2), f"{name}() waits for the device"))
        return func(*args, **(kwargs or {}))


class FallbackFinder(TorchFunctionMode):
    """Finds the line of an operation that runs on the host, by reading the counters after every call (slow)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = fallbacks()
        result = func(*args, **(kwargs or {}))
        for operation, times in fallbacks().items():
            if times > before.get(operation, 0):
                self.lines.setdefault(operation, source_line(2))
        return result


def compilations() -> int:
    """Graphs that this process has compiled, or read from the compilation cache."""
    return sum(int(metrics.counter_value(name) or 0) for name in ("UncachedCompile", "PersistentCacheHit"))


def compile_seconds() -> float:
    """Seconds that this process has spent in the compiler."""
    data = metrics.metric_data("CompileTime")
    return data[1] / 1e9 if data else 0.0


def fallbacks() -> dict[str, int]:
    """Operations that ran on the host because XLA has no lowering for them: name → count."""
    # _local_scalar_dense is `.item()` itself: the watch reports it with its line.
    names = [n for n in metrics.counter_names() if n.startswith("aten::") and n != "aten::_local_scalar_dense"]
    return {name: int(metrics.counter_value(name) or 0) for name in names}


def graph_text(tensors: Sequence[Tensor]) -> list[str]:
    """The traced graph that would compute `tensors`, a line for each operation."""
    return str(torch_xla._XLAC._get_xla_tensors_text(list(tensors))).splitlines()


def traced_with_lines(trace: Callable[[], Sequence[Tensor]]) -> list[str]:
    """The graph of `trace()` with the source line of each operation (slow; used once, when something is wrong)."""
    torch_xla._XLAC._set_ir_debug(True)
    try:
        with torch._C.DisableTorchFunction():  # otherwise the innermost Python frame would be the watch
            return graph_text(trace())
    finally:
        torch_xla._XLAC._set_ir_debug(False)


def first_difference(before: Sequence[str], after: Sequence[str]) -> tuple[str, str]:
    """The first difference between two traces of one function: (`function@file:line`, what is new there).

    Operations are compared by their text, with the operands' text in place of their numbers, because one more constant shifts
    all numbers. The cause is an operation that the old graph does not have, on operands that it has.

    Args:
        before: `graph_text` of the first call.
        after: `traced_with_lines` of the call that recompiled.
    """
    known = set(_operations(before).values())
    computed = _operations(after)
    causes = [
        line
        for number, line in _numbered(after)
        if computed[number] not in known and all(computed.get(o) in known for o in _OPERAND.findall(line))
    ]
    if not causes:
        return "unknown line", "the same operations with another constant (a Python number that became 0, 1 or -1?)"
    # An input has no line. Then use the first operation on it that has one, which is new, too.
    located = [line for line in causes if "location=" in line] or [
        line for number, line in _numbered(after) if computed[number] not in known and "location=" in line
    ]
    line = located[0] if located else causes[0]
    where = re.search(r"location=([^,]+)", line)
    operation = re.sub(r"\(.*", "", line).replace("{", " {").split()
    return (where[1] if where else "unknown line"), f"{operation[-1]} {operation[0]} is new in the graph"


_OPERAND = re.compile(r"%(\d+)")


def _numbered(graph: Sequence[str]) -> list[tuple[str, str]]:
    """(number, text) of each operation of a graph, operands before their users."""
    matches = (re.match(r"\s*%(\d+) = (.*)", line) for line in graph)
    return [(match[1], match[2]) for match in matches if match]


def _operations(graph: Sequence[str]) -> dict[str, int]:
    """Number of each operation → hash of what it computes, including its operands."""
    hashes: dict[str, int] = {}
    for number, line in _numbered(graph):
        plain = re.sub(r", (scope|location|ROOT)=[^,]*", "", line)
        hashes[number] = hash(_OPERAND.sub(lambda match: f"#{hashes.get(match[1], 0)}", plain))
    return hashes
