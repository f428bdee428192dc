"""Being asked to stop, with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.errors import Interrupted
from pretrain_xla.train.signals import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that went their usual way, which here is into a list."""
    signals: list[int] = []

    def note(number: int, _frame: Any) -> None:
        signals.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    yield signals
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_remembered_and_the_second_takes_its_usual_way(number: int, heard: list[int]) -> None:
    with StopSignal(enabled=True) as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
        with pytest.raises(Interrupted, match="stopped at step 7") as caught:
            stop.leave("stopped at step 7")
        assert caught.value.signal == number


def test_afterwards_signals_go_their_usual_way(heard: list[int]) -> None:
    with StopSignal(enabled=True) as stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert stop.signal is None
    with pytest.raises(ZeroDivisionError), StopSignal(enabled=True):
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT]


def test_where_it_is_not_enabled_it_hears_nothing(heard: list[int]) -> None:
    with StopSignal(enabled=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert stop.signal is None


def test_in_another_thread_it_keeps_quiet() -> None:
    found: list[int | None] = []

    def run() -> None:
        with StopSignal(enabled=True) as stop:  # Python allows handlers in the main thread only
            found.append(stop.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


SCRIPT = """
import os, signal
from pretrain_xla.train.signals import StopSignal
with StopSignal(enabled=True) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("saving", stop.signal, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there", flush=True)
"""


def test_a_second_sigterm_ends_the_process() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"saving {int(signal.SIGTERM)}\n"
    assert done.returncode == -signal.SIGTERM
