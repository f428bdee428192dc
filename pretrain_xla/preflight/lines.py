"""Names for operations: the module and the line of this package that each operation of the graph comes from, also backward.

torch_xla records the innermost Python frame of an operation. That is a line of PyTorch for most operations, and `.backward()`
for all of the backward pass. `SourceLines` instead opens a scope around every PyTorch function, which XLA keeps in `op_name`:
`blocks.3.attention.query in model/layers.py:31`. The autograd nodes that the function creates open the same scope in the
backward pass, marked with `~`. Model, step and optimizer need not know of it.

Needs `XLA_IR_DEBUG=1` and `XLA_HLO_DEBUG=1` in the environment before torch_xla is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import torch_xla
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

import pretrain_xla
from pretrain_xla.preflight.hlo import BACKWARD, SCOPE

PACKAGE = os.path.dirname(os.path.abspath(pretrain_xla.__file__)) + os.sep
SKIPPED = tuple(
    os.path.join(PACKAGE, *part.split("/")) for part in ("preflight/", "model/xla/saved.py", "runtime/xla/scan.py")
)
"""Files whose operations are attributed to the lines that call them."""


class SourceLines(TorchFunctionMode):
    """While it is entered, every operation is recorded under `module in file:line`."""

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[nn.Module, str] = {}
        # Node → its scope. The nodes are kept alive, because they are found by identity.
        self._nodes: dict[Any, str] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a PyTorch function inside its scope, and tag the autograd nodes that it creates."""
        return self._run(sys._getframe(1), function, *args, **(kwargs or {}))

    def __enter__(self) -> SourceLines:
        """Also open a scope around our own autograd functions, whose kernels call no PyTorch function."""
        entered = super().__enter__()
        original = Function.apply.__func__  # type: ignore[attr-defined]

        def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
            return self._run(sys._getframe(1), original, kind, *args, **kwargs)

        self._patch = mock.patch.object(Function, "apply", classmethod(apply))
        self._patch.start()
        return entered

    def __exit__(self, *error: Any) -> None:
        """Leave."""
        self._patch.stop()
        super().__exit__(*error)

    def _run(self, frame: FrameType, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        label = self._label(frame)
        if not label:
            return function(*args, **kwargs)
        scope = torch_xla._XLAC.profiler.scope_pusher(label)
        try:
            result = function(*args, **kwargs)
        finally:
            del scope
        for tensor in _tensors(result):
            if tensor.grad_fn is not None:
                self._tag(tensor.grad_fn, label)
        return result

    def _label(self, innermost: FrameType) -> str:
        """`module in file:line` of the innermost frame of the package; "" if there is none."""
        line, module, mark = "", "", ""
        frame: FrameType | None = innermost
        while frame is not None:
            filename = frame.f_code.co_filename
            if filename.startswith(PACKAGE) and not filename.startswith(SKIPPED):
                line = line or f"{filename[len(PACKAGE) :]}:{frame.f_lineno}"
                owner, node = frame.f_locals.get("self"), frame.f_locals.get("ctx")
                if not module and isinstance(owner, nn.Module):
                    module = self._name(owner, frame)
                # In our own autograd functions, `ctx` is the node that was tagged in the forward pass.
                if node is not None and frame.f_code.co_name == "backward":
                    module, mark = module or self._nodes.get(node, "").partition(SCOPE)[0], BACKWARD
            frame = frame.f_back
        return f"{module.rstrip(BACKWARD)}{mark}{SCOPE}{line}" if line else ""

    def _name(self, module: nn.Module, frame: FrameType) -> str:
        """The dotted name of a module within the outermost module being called."""
        if module not in self._modules:
            outermost = module
            above: FrameType | None = frame
            while above is not None:
                owner = above.f_locals.get("self")
                outermost = owner if isinstance(owner, nn.Module) else outermost
                above = above.f_back
            self._modules |= {child: name for name, child in outermost.named_modules()}
        return self._modules.get(module, "")

    def _tag(self, node: Any, label: str) -> None:
        """Give this scope to a new node, and to its inputs' nodes that have none, for their backward pass."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node is None or self._nodes.get(node):
                continue
            self._nodes[node] = label
            module, _, line = label.partition(SCOPE)
            module = module.rstrip(BACKWARD)  # created during another backward pass: recomputation, or a loop's body
            scopes: list[Any] = []

            def enter(
                _gradients: Any, scopes: list[Any] = scopes, name: str = f"{module}{BACKWARD}{SCOPE}{line}"
            ) -> None:
                scopes.append(torch_xla._XLAC.profiler.scope_pusher(name))

            def leave(_inputs: Any, _outputs: Any, scopes: list[Any] = scopes) -> None:
                scopes.clear()

            node.register_prehook(enter)
            node.register_hook(leave)
            waiting += [previous for previous, _ in node.next_functions]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)
