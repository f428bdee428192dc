"""Shards that several threads need at a time, like the readers of a bucket."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pretrain_xla.config import DataConfig
from pretrain_xla.data import shard_loader as loader
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from tests.shard_writers import WRITERS


@pytest.fixture
def shards(tmp_path):
    """The loader of three Parquet shards, which have to be decoded before they can be read."""
    (folder := tmp_path / "shards").mkdir()
    write = next(write for name, write in WRITERS.items() if name.endswith(".parquet"))
    for number in range(3):
        write(folder / f"{number}.parquet", [number + 1] * 1000)
    return open_dataset(str(folder), 64, 1000, settings=DataConfig(cache_dir=str(tmp_path / "cache"))).loader


@pytest.fixture
def gate(monkeypatch):
    """No shard is made ready before this is opened."""
    opened, make = threading.Event(), loader._Maker.make

    def wait_and_make(self, number, closing):
        assert opened.wait(30)
        return make(self, number, closing)

    monkeypatch.setattr(loader._Maker, "make", wait_and_make)
    yield opened
    opened.set()


def first_token(shards, number):
    return int(shards.tokens(number).rows(np.array([0]), 1)[0, 0])


def waiting_for(shards, number):
    """A thread that waits for a shard, and its result: the first token, or an error."""
    found = []

    def wait():
        try:
            found.append(first_token(shards, number))
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    limit = time.monotonic() + 10
    while number not in shards._state.awaited:
        assert time.monotonic() < limit
        time.sleep(0.001)
    return thread, found


def test_a_shard_that_one_thread_waits_for_is_not_dropped_by_the_plan_of_another(shards, gate):
    shards.plan([0], [1])
    thread, found = waiting_for(shards, 0)
    shards.plan([2], [])
    gate.set()
    thread.join(10)
    assert found == [1]
    assert first_token(shards, 2) == 3
    shards.plan([2], [])
    assert list(shards._state.ready) == [2]  # nobody waits any more, so the first is let go


def test_an_error_that_one_thread_waits_for_is_not_removed_by_the_plan_of_another(shards, gate):
    shards.plan([0], [])
    thread, found = waiting_for(shards, 0)
    with shards._state.changed:  # so that the plan comes before the thread wakes
        shards._state.errors[0] = UserError("spoilt")
        shards.plan([1], [])
    thread.join(10)
    assert found == ["spoilt"]


def test_local_shards_are_never_read_by_ranges(tmp_path):
    np.save(tmp_path / "0.npy", np.ones(1000, np.uint16))
    dataset = open_dataset(str(tmp_path), 64, 1000, settings=DataConfig(remote_reads="ranged"))
    assert Batches(dataset, sequences_per_batch=8, seq_length=64, seed=1).threads == 1
    assert not dataset.loader.ranged
