"""A loop that hangs ends with every thread's stack and its own exit status; one that lives, or was stopped, does not end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.train.run import run
from pretrain_xla.train.step import TrainStep
from pretrain_xla.train.watchdog import HUNG, Watchdog

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, threading, time
from pretrain_xla.train.watchdog import Watchdog

def reads_a_bucket():
    time.sleep(60)

threading.Thread(target=reads_a_bucket, daemon=True).start()
with Watchdog(1.0, lambda: "step 7") as watchdog:
    for _ in range(10):
        time.sleep(0.2)
        watchdog.beat()
    print("alive", flush=True)
    # Stopped here by the test for longer than the watchdog waits.
    for _ in range(10):
        time.sleep(0.2)
        watchdog.beat()
    print("alive after a stop", flush=True)
with Watchdog(None, lambda: "never"):
    time.sleep(0.1)
with Watchdog(0.5, lambda: "step 8"):
    def waits_for_a_device():
        time.sleep(60)
    waits_for_a_device()
"""


def test_it_tells_a_hang_from_work_and_from_a_stopped_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.5)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == HUNG
    assert output == "alive after a stop\n"
    assert errors.startswith(
        "step 8 has made no progress for 0.5 s (--hang-timeout); the stack of every thread follows"
    )
    assert "in waits_for_a_device" in errors
    assert "in reads_a_bucket" in errors


def test_a_step_that_hangs_ends_the_run(
    make_config: Callable[..., RunConfig],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    plain, statuses, ended = TrainStep.__call__, list[int](), threading.Event()

    def call(self: TrainStep, *arguments: Tensor) -> Tensor:
        if self.optimizer.step == 4:
            assert ended.wait(60)
        return plain(self, *arguments)

    def end(status: int) -> None:  # of this process, which is the test's
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(TrainStep, "__call__", call)
    monkeypatch.setattr(os, "_exit", end)
    run(make_config(train={"train_steps": 6, "valid_steps": 1, "hang_timeout": 2.0}, checkpoint={"save_interval": 2}))
    errors = capfd.readouterr().err
    assert HUNG in statuses
    assert "step 5 has made no progress for 2 s (--hang-timeout)" in errors
    assert "in _one_step" in errors
    assert errors.count("Thread 0x") > 1
    assert (tmp_path / "run" / "checkpoints" / "step_00000004" / "checkpoint.json").exists()


def test_each_advance_of_a_progress_bar_is_a_sign_of_life() -> None:
    seen: list[object] = []

    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        seen.append((what, total))
        yield seen.append

    watchdog = Watchdog(None, lambda: "")
    with watchdog.beating(bar)("scoring", 3) as advance:
        for number in range(3):
            before = watchdog._last
            time.sleep(0.001)
            advance(number)
            assert watchdog._last > before
    assert seen == [("scoring", 3), 0, 1, 2]
