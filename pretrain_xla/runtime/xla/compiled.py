"""A traced function as one compiled graph, and a watch over recompilations and host fallbacks with their source lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch_xla
from torch import Tensor

from pretrain_xla.runtime.base import GraphCounts, GraphEvent
from pretrain_xla.runtime.xla import graphs
from pretrain_xla.runtime.xla.compiler_warnings import compiler_warnings, in_words


class CompiledFunction:
    """A function traced at each call and run as one graph; reports where its graph changed."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        name: str,
        state: Callable[[], Iterable[Tensor]],
        counts: GraphCounts,
        record: Callable[[GraphEvent], None],
        *,
        explain: bool,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._function, self._name, self._state = function, name, state
        self._counts, self._record = counts, record
        self._first_graph: list[str] = []
        # On a recompilation, trace once more to find the line. That invalidates the state, so only a strict run does it.
        self._explain = explain
        # Called with the compiler's warnings on resharding. None means that there is no mesh.
        self._warn = warn
        self._settled = False

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Trace, run, and record unwanted events."""
        before, fallen = graphs.compilations(), graphs.fallbacks()
        result = self._function(*arguments)
        if not self._first_graph:
            self._first_graph = graphs.graph_text([result, *self._state()])
        self._compile_and_run()
        added = graphs.compilations() - before
        fell = [name for name, times in graphs.fallbacks().items() if times > fallen.get(name, 0)]
        if fell:
            lines = self._fallback_lines(arguments)
            for name in fell:
                what = f"XLA cannot lower {name}, so the {self._name} step waits for the host"
                self._record(GraphEvent("host fallback", lines.get(name, f"the {self._name} step"), what))
        # A host fallback or transfer splits the graph: report the cause, not the new graphs.
        if added and not fell:
            # The first call may have added none, if its graph existed. Then the next new graph is a recompilation, too.
            if self._settled:
                self._record(GraphEvent("recompilation", *self._explanation(arguments)))
            self._counts.graphs[self._name] = self._counts.graphs.get(self._name, 0) + added
        self._settled = self._settled or not fell
        return result

    def _compile_and_run(self) -> None:
        if self._warn is None or self._settled:
            torch_xla.sync()
            return
        with compiler_warnings() as lines:
            torch_xla.sync()
        if words := in_words(lines, f"the {self._name} step"):
            self._warn(words)

    def _fallback_lines(self, arguments: tuple[Tensor, ...]) -> dict[str, str]:
        if not self._explain:
            return {}
        with graphs.FallbackFinder() as finder:
            self._function(*arguments)
        return finder.lines

    def _explanation(self, arguments: tuple[Tensor, ...]) -> tuple[str, str]:
        if not self._explain:
            return f"the {self._name} step", "its graph changed; --strict-graph stops there and names the line"
        graph = graphs.traced_with_lines(lambda: [self._function(*arguments), *self._state()])
        return graphs.first_difference(self._first_graph, graph)
