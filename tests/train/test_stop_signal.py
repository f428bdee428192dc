"""SIGTERM and Ctrl-C, with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.errors import Interrupted
from pretrain_xla.runtime import Hosts
from pretrain_xla.train.stop_signal import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that reach the previous handler, which appends them to this list."""
    signals: list[int] = []

    def note(number: int, _frame: Any) -> None:
        signals.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    yield signals
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_recorded_and_the_second_reaches_the_previous_handler(number: int, received: list[int]) -> None:
    with StopSignal(Hosts()) as stop:
        assert not stop.stops_here()
        os.kill(os.getpid(), number)
        assert stop.stops_here()
        assert received == []
        os.kill(os.getpid(), number)
        assert received == [number]
        with pytest.raises(Interrupted, match="stopped at step 7") as caught:
            stop.leave("stopped at step 7")
        assert caught.value.signal == number


def test_afterwards_signals_reach_the_previous_handler(received: list[int]) -> None:
    with StopSignal(Hosts()) as stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert not stop.stops_here()
    with pytest.raises(ZeroDivisionError), StopSignal(Hosts()):
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "PRETRAIN_XLA_SUPERVISED_SINCE"])
def test_what_a_launcher_passes_on_is_not_a_second_request(
    launcher: str, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launcher, "1")
    with StopSignal(Hosts()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)  # from the scheduler or the machine that shuts down, to all processes
        os.kill(os.getpid(), signal.SIGTERM)  # from torchrun or the supervisor, which received it, too
        assert stop.stops_here()
        assert received == []
        stop._first = time.monotonic() - 4  # seconds later it is the user's
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]


def test_in_another_thread_it_does_nothing() -> None:
    found: list[bool] = []

    def run() -> None:
        with StopSignal(Hosts()) as stop:  # Python allows handlers in the main thread only
            found.append(stop.stops_here())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


SCRIPT = """
import os, signal, time
from pretrain_xla.runtime import Hosts
from pretrain_xla.train.stop_signal import StopSignal
hosts = Hosts()
with StopSignal(hosts) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("saving", hosts.stopped_by, flush=True)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there", flush=True)
"""


COMPILING = """
import hashlib, os, signal, threading, time
from pretrain_xla.runtime import Hosts
from pretrain_xla.train import stop_signal as signals
signals.PATIENCE = 0.2
def press():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
with signals.StopSignal(Hosts(), lambda: "finishing step 1 and saving") as stop:
    threading.Thread(target=press, daemon=True).start()
    if not os.fork():
        os._exit(signal.set_wakeup_fd(-1) != -1)  # a forked child does not print for its parent
    assert os.wait()[1] == 0
    # As in a compiler, the main thread runs without the interpreter's lock, and runs no signal handler for long.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
"""


def test_a_signal_is_answered_at_once_while_the_main_thread_compiles() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [
        "finishing step 1 and saving; again to leave at once",
        "left at once; the same command continues from the newest checkpoint",
    ]
    assert done.returncode == 128 + signal.SIGINT


def test_a_second_sigterm_ends_the_process() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"saving {int(signal.SIGTERM)}\n"
    assert done.stderr == "stopping; again to leave at once\n"
    assert done.returncode == -signal.SIGTERM
