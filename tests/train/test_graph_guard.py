"""The graph guard: strict runs end at the first event, others report each line once and count."""

from __future__ import annotations

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.runtime.base import GraphCounts, GraphEvent
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.train.graph_guard import GraphGuard

RECOMPILATION = GraphEvent("recompilation", "model.py:12 in forward", "aten::sin f32[3,4] is new in the graph")
TRANSFER = GraphEvent("host transfer", "trainer.py:90 in fit", "item() waits for the device")
ELSEWHERE = GraphEvent("host transfer", "loss.py:5 in loss", "item() waits for the device")


@pytest.fixture
def messages() -> list[str]:
    return []


def emit(runtime: TorchRuntime, *events: GraphEvent) -> None:
    runtime._events.extend(events)


def test_a_strict_run_ends_and_names_the_line(runtime: TorchRuntime, messages: list[str]) -> None:
    guard = GraphGuard(runtime, strict=True, say=messages.append)
    guard.check(1)
    emit(runtime, RECOMPILATION)
    with pytest.raises(UserError) as caught:
        guard.check(7)
    line = str(caught.value)
    assert line.startswith("step 7: recompilation at model.py:12 in forward: aten::sin f32[3,4] is new in the graph")
    assert "\n" not in line
    assert messages == []
    assert guard.total("recompilation") == 1


def test_other_runs_report_each_line_once_and_count(runtime: TorchRuntime, messages: list[str]) -> None:
    guard = GraphGuard(runtime, strict=False, say=messages.append)
    emit(runtime, TRANSFER, TRANSFER, RECOMPILATION)
    guard.check(3)
    emit(runtime, TRANSFER, ELSEWHERE)
    guard.check(4)
    guard.check(5)
    assert [line.split(" (")[0] for line in messages] == [
        f"step 3: {TRANSFER}",
        f"step 3: {RECOMPILATION}",
        f"step 4: {ELSEWHERE}",
    ]
    assert (guard.total("host transfer"), guard.total("recompilation"), guard.total("host fallback")) == (4, 1, 0)
    assert guard.counts["host transfer", TRANSFER.where] == 3


def test_the_summary_counts_graphs_and_events_by_line(
    runtime: TorchRuntime, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_counts", GraphCounts({"train": 2, "validation": 1}, 12.3456))
    guard = GraphGuard(runtime, strict=False, say=messages.append)
    emit(runtime, TRANSFER, TRANSFER, RECOMPILATION)
    guard.check(1)
    assert guard.summary() == {
        "graphs": {"train": 2, "validation": 1},
        "compile_seconds": 12.35,
        "recompilations": 1,
        "host_fallbacks": 0,
        "unplanned_host_transfers": 2,
        "lines": {
            "host transfer at trainer.py:90 in fit": 2,
            "recompilation at model.py:12 in forward": 1,
        },
    }
