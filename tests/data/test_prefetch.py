from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain_xla.data.prefetch import Prefetcher

ROOT = Path(__file__).resolve().parents[2]


def threads():
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert threads() == 0
    yield
    assert threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_order_and_end(depth):
    with Prefetcher(lambda step: step * step, 3, 20, depth) as items:
        assert list(items) == [step * step for step in range(3, 20)]
        assert list(items) == []
    with Prefetcher(lambda step: step, 5, 5, depth) as items:
        assert list(items) == []


def test_works_ahead_by_depth_and_no_more():
    made = []
    with Prefetcher(lambda step: made.append(step) or step, 0, 100, 3) as items:
        wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert next(items) == 0
        wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def wait_until(condition):
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


class Unusual(Exception):
    pass


@pytest.mark.parametrize(
    ("kind", "raised"),
    [(Unusual, Unusual), (KeyboardInterrupt, KeyboardInterrupt), (StopIteration, RuntimeError)],  # never a silent end
)
def test_error_is_raised_where_its_item_would_have_come(kind, raised):
    def make(step):
        if step == 2:
            raise kind("at two")
        return step

    items = Prefetcher(make, 0, 10, 4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(raised, match="at two"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closes_early_whether_the_thread_waits_or_works():
    for depth in (1, 5):
        items = Prefetcher(lambda step: step, 0, 10**9, depth)
        next(items)
        items.close()
        items.close()
        assert threads() == 0
        assert list(items) == []
    busy = threading.Event()
    items = Prefetcher(lambda step: busy.set() or time.sleep(0.1), 0, 10, 1)
    busy.wait()
    items.close()


def test_break_and_exceptions_close_it():
    def consume():
        with Prefetcher(lambda step: step, 0, 10**9, 2) as items:
            for item in items:
                if item == 5:
                    raise Unusual

    with pytest.raises(Unusual):
        consume()


def test_unclosed_one_is_closed_when_garbage_collected():
    items = Prefetcher(lambda step: step, 0, 10**9, 2)
    next(items)
    del items
    gc.collect()
    assert threads() == 0


def test_unclosed_one_does_not_keep_the_interpreter_alive():
    code = (
        "from pretrain_xla.data.prefetch import Prefetcher\n"
        "items = Prefetcher(lambda step: step, 0, 10**9, 2); next(items); print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_counts_the_time_that_the_consumer_waits():
    with Prefetcher(lambda step: time.sleep(0.05), 0, 3, 1) as items:
        list(items)
        assert 0.1 < items.seconds_waited < 1
    with Prefetcher(lambda step: step, 0, 5, 5) as items:
        time.sleep(0.1)
        list(items)
        assert items.seconds_waited < 0.05


def test_needs_a_depth():
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(lambda step: step, 0, 1, 0)
