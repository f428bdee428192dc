"""Scores are the same during training and afterwards, on each runtime, mesh, process count and batch size, with few graphs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Result, metrics, run, summary, torchrun

XLA = {"PJRT_DEVICE": "CPU"}
FOUR = XLA | {"CPU_NUM_DEVICES": "4"}
LIMIT = 24  # the number of sequences that validation uses


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> list[str]:
    """Tasks whose items differ much in length."""
    folder = tmp_path_factory.mktemp("items")
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(["tea", "a", "roof", "sunlight", "and", "surgeon"], k=rng.randint(1, most)))

    questions = [
        {"query": words(15), "choices": [words(6) for _ in range(4)], "gold": rng.randrange(4)} for _ in range(40)
    ]
    (folder / "h.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    (folder / "l.jsonl").write_text("".join(json.dumps({"text": words(25)}) + "\n" for _ in range(LIMIT)))
    (folder / "t.txt").write_text(words(500))
    return [
        f"hellaswag={folder}/h.jsonl",
        f"lambada={folder}/l.jsonl",
        f"text={folder}/t.txt",
        f"shards={tokens}/valid",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]], tasks: list[str]) -> Path:
    """A run on XLA that evaluates the tasks while it trains; --strict-graph forbids recompilation."""
    run_dir = tmp_path_factory.mktemp("run")
    arguments = flags(run_dir, vocab_size=257, seq_length=96, tokenizer="bytes", valid_interval=20, tensorboard=True)
    more = ["--eval-tasks", *tasks, "--eval-interval", "10", "--eval-limit", str(LIMIT), "--strict-graph"]
    done = run("run_pretrain_xla.py", *arguments, *more, **XLA)
    assert done.status == 0, done.errors
    assert "step     20  hellaswag  acc 0." in done.output
    return run_dir


def scores_of(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name}


def test_during_training(trained: Path) -> None:
    rows = [row for row in metrics(trained) if "lambada/acc" in row]
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["shards/loss"] > rows[1]["shards/loss"]
    valid = [row["valid_loss"] for row in metrics(trained) if "valid_loss" in row]
    assert rows[1]["shards/loss"] == pytest.approx(valid[-1], rel=1e-5)
    counts = summary(trained)
    assert counts["scores"] == scores_of(rows[1])
    # Items are padded to 32, 64 or 96 tokens, and each length has one graph.
    assert counts["graphs"] == {"train": 1, "validation": 1, "other": 0, **{f"evaluate {n}": 1 for n in (32, 64, 96)}}
    assert counts["recompilations"] == counts["host_fallbacks"] == counts["unplanned_host_transfers"] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/hellaswag/acc_norm")] == [10, 20]


SETUPS: dict[str, Callable[..., Result]] = {
    "torchrun, 2 processes": lambda *arguments: torchrun(2, *arguments, "--runtime", "torch", "--batch-size", "5"),
    "spmd data 2 x fsdp 2": lambda *arguments: run(*arguments, "--mesh-fsdp", "2", "--batch-size", "9", **FOUR),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_evaluate_command(setup: str, trained: Path, tasks: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    argv = ["evaluate.py", "--model", str(trained), "--tasks", *tasks, "--limit", str(LIMIT), "--output", str(output)]
    done = SETUPS[setup](*argv)
    assert done.status == 0, done.errors
    assert done.output.count("hellaswag: lm-eval's") == 1, "only one process prints"
    found = json.loads(output.read_text())
    values = {f"{task}/{name}": value for task, one in found["tasks"].items() for name, value in one["scores"].items()}
    assert values == pytest.approx(scores_of(metrics(trained)[-1]), rel=1e-4)
    assert all(one["items"] == len(one["examples"]) for one in found["tasks"].values())
    if "spmd" in setup:
        assert found["graphs"] == {"other": 0, **{f"evaluate {n}": 1 for n in (32, 64, 96)}}
