"""Faults injected into the model or the loop: strict runs stop and name the line; others report it once and continue."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import losses, run, summary

XLA = {"PJRT_DEVICE": "CPU"}
PREAMBLE = """
import sys
sys.argv = ["run_pretrain_xla.py", *sys.argv[1:]]
import torch
from pretrain_xla.cli import run_pretrain
from pretrain_xla.model.xla.attention import XlaFeedForward
from pretrain_xla.train.trainer import Trainer

calls = {"steps": 0}
plain_forward, plain_step = XlaFeedForward.forward, Trainer._one_step

def step(self, done, tokens):
    calls["steps"] = done
    plain_step(self, done, tokens)

Trainer._one_step = step
"""
FAULTS = {
    # A Python float that becomes 1.0, which XLA takes as a constant of the graph.
    "changing float": """
def faulty(self, x, *save):
    return plain_forward(self, x, *save) * (0.5 if calls["steps"] < 5 else 1.0)  # FAULT
XlaFeedForward.forward = faulty
""",
    # A shape with one more row in one step.
    "changing shape": """
def faulty(self, x, *save):
    rows = 2 if calls["steps"] == 6 else 1
    noise = torch.ones(rows, 1, device=x.device).sum(0)  # FAULT
    return plain_forward(self, x, *save) * noise
XlaFeedForward.forward = faulty
""",
    "item in the step": """
def faulty(self, x, *save):
    out = plain_forward(self, x, *save)
    if calls["steps"] == 5:
        out.sum().item()  # FAULT
    return out
XlaFeedForward.forward = faulty
""",
    "item in the loop": """
def faulty(self, done, tokens):
    step(self, done, tokens)
    if done == 5:
        float(self._history[-1, 0])  # FAULT
Trainer._one_step = faulty
""",
    "operation without a lowering": """
def faulty(self, x, *save):
    out = plain_forward(self, x, *save)
    if calls["steps"] == 5:
        out = out + torch.special.erfcx(x).mean() * 0.0  # FAULT
    return out
XlaFeedForward.forward = faulty
""",
}
EXPECTED = {
    "changing float": "recompilation at",
    "changing shape": "recompilation at",
    "item in the step": "host transfer at",
    "item in the loop": "host transfer at",
    "operation without a lowering": "host fallback at",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_stops_at_the_line(fault: str, tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(PREAMBLE + FAULTS[fault] + '\nrun_pretrain("xla")\n')
    line = next(n for n, text in enumerate(script.read_text().splitlines(), 1) if "# FAULT" in text)
    done = run(str(script), *flags(tmp_path / "run"), "--strict-graph", **XLA)
    assert done.status == 2, done.errors
    assert EXPECTED[fault] in done.last_error
    assert "faulty" in done.last_error
    assert f"faulty.py:{line}" in done.last_error


def test_without_strict_it_is_reported_once_and_counted(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    script = tmp_path / "faulty.py"
    fault = FAULTS["item in the step"].replace("== 5", ">= 5")
    script.write_text(PREAMBLE + fault + '\nrun_pretrain("xla")\n')
    done = run(str(script), *flags(tmp_path / "run"), **XLA)
    assert done.status == 0, done.errors
    assert done.output.count("host transfer at") == 1
    counts = summary(tmp_path / "run")
    assert counts["unplanned_host_transfers"] == 2 * 16  # two layers, steps 5 to 20
    assert any("faulty.py" in line for line in counts["lines"])
    assert len(losses(tmp_path / "run")) == 20


def test_500_steps_with_validations_and_checkpoints_compile_once(
    tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    long = flags(tmp_path, train_steps=500, decay_steps=500, valid_interval=100, save_interval=150, log_interval=50)
    done = run("run_pretrain_xla.py", *long, "--strict-graph", **XLA)
    assert done.status == 0, done.errors
    counts = summary(tmp_path)
    assert counts["steps"] == 500
    assert counts["graphs"] == {"train": 1, "validation": 1, "other": 0}
    assert counts["recompilations"] == counts["host_fallbacks"] == counts["unplanned_host_transfers"] == 0
