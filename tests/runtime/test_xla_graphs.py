"""Finding the line at which a graph changed, on graphs written by hand and on real ones.

All of it runs in one subprocess: importing torch_xla changes torch for later tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from .. import forks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")

ROOT = Path(__file__).parents[2]

BEFORE = """
IR {
  %0 = f32[] prim::Constant(), value=1, xla_shape=f32[]
  %1 = f32[3,4]{1,0} xla::device_data(), xla_shape=f32[3,4]{1,0}
  %2 = f32[] xla::device_data(), xla_shape=f32[]
  %3 = f32[3,4]{1,0} aten::mul(%1, %2), xla_shape=f32[3,4]{1,0}
  %4 = f32[3,4]{1,0} aten::add(%3, %1, %0), xla_shape=f32[3,4]{1,0}
  %5 = f32[] aten::sum(%4), dtype=6, xla_shape=f32[], ROOT=0
}
"""
LINES = {
    0: "location=add@model.py:12",
    2: "location=scale@model.py:10",
    3: "scope=aten::mul.3, location=scale@model.py:10",
    4: "scope=aten::add.4, location=add@model.py:12",
    5: "location=loss@model.py:20",
}


def with_source_lines(graph: str, lines: dict[int, str]) -> str:
    """The same graph as a trace with source lines prints it."""
    result = []
    for line in graph.splitlines():
        head, mark, tail = line.partition(", xla_shape")
        number = int(line.split("=")[0].strip(" %")) if mark else -1
        result.append(f"{head}, {lines[number]}{mark}{tail}" if number in lines else line)
    return "\n".join(result)


# A sine between multiplication and addition shifts all numbers after it.
WITH_SINE = """
IR {
  %0 = f32[] prim::Constant(), value=1, location=add@model.py:12, xla_shape=f32[]
  %1 = f32[3,4]{1,0} xla::device_data(), xla_shape=f32[3,4]{1,0}
  %2 = f32[] xla::device_data(), location=scale@model.py:10, xla_shape=f32[]
  %3 = f32[3,4]{1,0} aten::mul(%1, %2), location=scale@model.py:10, xla_shape=f32[3,4]{1,0}
  %4 = f32[3,4]{1,0} aten::sin(%3), scope=aten::sin.1, location=twist@model.py:11, xla_shape=f32[3,4]{1,0}
  %5 = f32[3,4]{1,0} aten::add(%4, %1, %0), location=add@model.py:12, xla_shape=f32[3,4]{1,0}
  %6 = f32[] aten::sum(%5), dtype=6, location=loss@model.py:20, xla_shape=f32[], ROOT=0
}
"""
# The same, and one more constant in front.
WITH_CONSTANT = """
IR {
  %0 = f32[] prim::Constant(), value=1, location=add@model.py:12, xla_shape=f32[]
  %1 = f32[3,4]{1,0} xla::device_data(), xla_shape=f32[3,4]{1,0}
  %2 = f32[] prim::Constant(), value=0, location=mask@model.py:30, xla_shape=f32[]
  %3 = f32[3,4]{1,0} aten::add(%1, %2, %0), location=mask@model.py:31, xla_shape=f32[3,4]{1,0}
  %4 = f32[] xla::device_data(), location=scale@model.py:10, xla_shape=f32[]
  %5 = f32[3,4]{1,0} aten::mul(%3, %4), location=scale@model.py:10, xla_shape=f32[3,4]{1,0}
  %6 = f32[3,4]{1,0} aten::add(%5, %3, %0), location=add@model.py:12, xla_shape=f32[3,4]{1,0}
  %7 = f32[] aten::sum(%6), dtype=6, location=loss@model.py:20, xla_shape=f32[], ROOT=0
}
"""
# One more output after the sum, which changes the sum's own output number.
WITH_OUTPUT = with_source_lines(BEFORE.replace("ROOT=0\n}", "ROOT=1\n}"), LINES).replace(
    "\n}", "\n  %6 = f32[3,4]{1,0} aten::neg(%4), location=extra@model.py:40, xla_shape=f32[3,4]{1,0}, ROOT=0\n}"
)
AFTER = {
    "same": with_source_lines(BEFORE, LINES),
    "wider input": with_source_lines(BEFORE, LINES).replace("[3,4]", "[3,5]"),
    "new operation": WITH_SINE,
    "other operation": with_source_lines(BEFORE.replace("aten::mul", "aten::div"), LINES),
    "other constant": with_source_lines(BEFORE.replace("value=1", "value=2"), LINES),
    "new constant": WITH_CONSTANT,
    "new output": WITH_OUTPUT,
    "no lines": BEFORE.replace("aten::mul", "aten::div"),
    "empty": "",
}
# What first_difference must return: the line, and part of its description.
EXPECTED = {
    "same": ("unknown line", "another constant"),
    "wider input": ("scale@model.py:10", "f32[3,5]"),
    "new operation": ("twist@model.py:11", "aten::sin f32[3,4] is new in the graph"),
    "other operation": ("scale@model.py:10", "aten::div"),
    "other constant": ("add@model.py:12", "prim::Constant f32[] is new in the graph"),
    "new constant": ("mask@model.py:30", "prim::Constant"),
    "new output": ("extra@model.py:40", "aten::neg"),
    "no lines": ("unknown line", "aten::div"),
    "empty": ("unknown line", ""),
}

SCRIPT = """
import json, sys
import torch, torch_xla
from pretrain_xla.runtime.xla import graphs
from pretrain_xla.runtime.base import GraphCounts
from pretrain_xla.runtime.xla.compiled import CompiledFunction

torch_xla.runtime.use_spmd()  # as the trainer does, also with one device
given = json.load(sys.stdin)
before = given["before"].splitlines()
result = {"hand": {name: graphs.first_difference(before, text.splitlines()) for name, text in given["after"].items()}}

device = torch_xla.device()
x = torch.arange(12.0).reshape(3, 4).to(device)
torch_xla.sync()

def step(x, times, twisted=False):
    y = x * times
    if twisted:
        y = y.sin()  # LINE
    return [(y + x).sum()]

first = graphs.graph_text(step(x, 2.5))
wide = torch.cat([x, x], 1)
torch_xla.sync()
result["real"] = {
    "same": graphs.first_difference(first, graphs.traced_with_lines(lambda: step(x, 2.5))),
    "twisted": graphs.first_difference(first, graphs.traced_with_lines(lambda: step(x, 2.5, True))),
    "wide": graphs.first_difference(first, graphs.traced_with_lines(lambda: step(wide, 2.5))),
}

counts = [graphs.compilations()]
for times in (2.5, 2.5, 3.5):
    value = step(x, times)[0]
    torch_xla.sync()
    counts.append(graphs.compilations())
shape = step(wide, 2.5)[0]
torch_xla.sync()
result["compilations"] = [*counts, graphs.compilations()]
result["compile_seconds"] = graphs.compile_seconds()

events = []
watch = graphs.HostTransferWatch(events.append)
host = torch.ones(3)
value.item()
with watch:
    host.sum().item()
    host.tolist()
    value.to(torch.bfloat16)
    value.detach() + 1
    watch.paused += 1
    value.item()
    watch.paused -= 1
    before_events = len(events)
    value.item()
    bool(value > 0)
    value.cpu()
    value.to("cpu")
    x.tolist()
value.item()
result["before"] = before_events
result["events"] = [(event.kind, event.where, event.what) for event in events]
result["fallbacks"] = graphs.fallbacks()

# A function whose first graph is already compiled, as with a compile cache.
found = []
counts = GraphCounts()
def twice(x):
    return (x * 2).tan().sum()
def compiled(name):
    return CompiledFunction(twice, name, tuple, counts, found.append, explain=False)
compiled("before")(x)
hit = compiled("hit")
hit(x)
hit(x)
result["hit"] = [event.kind for event in found]
hit(wide)
result["then"] = [event.kind for event in found]
result["graphs"] = counts.graphs
# A counter for programs read from the compile cache, which XLA's CPU client cannot do.
plain = graphs.metrics.counter_value
graphs.metrics.counter_value = lambda name: {"UncachedCompile": 3, "PersistentCacheHit": 2}.get(name)
result["read from the cache"] = graphs.compilations()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the script prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}
    done = forks.run(["-c", SCRIPT], environment, stdin=json.dumps({"before": BEFORE, "after": AFTER}), timeout=240)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", AFTER)
def test_where_two_graphs_differ(case: str, found: dict[str, Any]) -> None:
    where, what = found["hand"][case]
    expected_where, expected_what = EXPECTED[case]
    assert where == expected_where
    assert expected_what in what


def test_where_two_real_graphs_differ(found: dict[str, Any]) -> None:
    line = SCRIPT.splitlines().index("        y = y.sin()  # LINE") + 1
    assert found["real"]["same"][0] == "unknown line"
    assert found["real"]["twisted"] == [f"step@<string>:{line}", "aten::sin f32[3,4] is new in the graph"]
    assert found["real"]["wide"][0].startswith("step@<string>:")
    assert "f32[3,8]" in found["real"]["wide"][1]


def test_a_new_value_compiles_nothing_and_a_new_shape_does(found: dict[str, Any]) -> None:
    start, first, again, other_value, other_shape = found["compilations"]
    assert first == start + 1
    assert again == other_value == first
    assert other_shape == first + 1
    assert 0 < found["compile_seconds"] < 120
    assert found["fallbacks"] == {}


def test_the_watch_sees_reads_of_the_device_and_nothing_else(found: dict[str, Any]) -> None:
    assert found["before"] == 0, "neither host tensors, nor casts, nor planned reads"
    lines = SCRIPT.splitlines()
    names = {"item": "    value.item()", "__bool__": "    bool(value > 0)", "cpu": "    value.cpu()"}
    names |= {"to": '    value.to("cpu")', "tolist": "    x.tolist()"}
    seen = {what.split("(")[0]: (kind, where) for kind, where, what in found["events"]}
    for name, text in names.items():
        kind, where = seen[name]
        assert kind == "host transfer"
        last = len(lines) - lines[::-1].index(text)
        assert where == f"<string>:{last} in <module>"
    assert len(found["events"]) == len(names)


def test_a_cached_first_graph_does_not_hide_the_next(found: dict[str, Any]) -> None:
    assert found["hit"] == []
    assert found["then"] == ["recompilation"]
    assert found["graphs"] == {"before": 1, "hit": 1}


def test_a_program_from_the_compile_cache_counts_as_a_graph(found: dict[str, Any]) -> None:
    assert found["read from the cache"] == 5
