"""The graph guard: stops or warns about a run that recompiles, falls back to the host or waits for the device.

The runtime records the events with their source lines; the guard reports them. Each compiled function may have one graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pretrain_xla.errors import UserError
from pretrain_xla.runtime import Runtime


class GraphGuard:
    """Checked after every step; with `strict`, the first event ends the run.

    Attributes:
        counts: (kind, source line) → number of events.
    """

    def __init__(self, runtime: Runtime, *, strict: bool, say: Callable[[str], None]) -> None:
        self._runtime, self._strict, self._say = runtime, strict, say
        self.counts: Counter[tuple[str, str]] = Counter()

    def check(self, step: int) -> None:
        """Report the events that the runtime recorded since the last check.

        Raises:
            UserError: strict, and there was an event; the text names the source line.
        """
        for event in self._runtime.take_events():
            key = (event.kind, event.where)
            self.counts[key] += 1
            if self._strict:
                raise UserError(f"step {step}: {event} (--strict-graph stops the run here)")
            if self.counts[key] == 1:
                self._say(f"step {step}: {event} (said once; --strict-graph would stop the run here)")

    def total(self, kind: str) -> int:
        """Number of events of a kind."""
        return sum(times for (event_kind, _), times in self.counts.items() if event_kind == kind)

    def summary(self) -> dict[str, object]:
        """For summary.json: number of graphs of each function, and events by kind and source line."""
        counts = self._runtime.graph_counts()
        return {
            "graphs": counts.graphs,
            "compile_seconds": round(counts.compile_seconds, 2),
            "recompilations": self.total("recompilation"),
            "host_fallbacks": self.total("host fallback"),
            "unplanned_host_transfers": self.total("host transfer"),
            "lines": {f"{kind} at {where}": times for (kind, where), times in self.counts.items()},
        }
