from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_xla.data.batches import PADDING, Batches
from pretrain_xla.data.dataset import TokenDataset, open_dataset
from pretrain_xla.data.permutation import key_of, permute
from pretrain_xla.data.shards import Shard
from pretrain_xla.errors import UserError


class Counting(TokenDataset):
    """Shards in memory whose tokens count up, so that a row shows where it is from."""

    def read(self, shards, starts, length):
        firsts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        ends = starts + length
        assert (ends <= np.array([shard.tokens for shard in self.shards])[shards]).all()
        return (firsts[shards] + starts)[:, None].astype(np.int32) + np.arange(length, dtype=np.int32)


def make(lengths, **settings):
    shards = tuple(Shard(f"/{n}", str(n), tokens, np.dtype("<u4"), 0) for n, tokens in enumerate(lengths))
    dataset = Counting("memory", shards, vocab_size=10**9, info=None)
    return Batches(dataset, **{"sequences_per_batch": 4, "seq_length": 3, "seed": 0, **settings})


def sequences(lengths, seq_length):
    """First token of every sequence, by the definition."""
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    return [
        first + number * seq_length
        for first, length in zip(firsts, lengths, strict=True)
        for number in range((length - 1) // seq_length)
    ]


cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(6, 60), min_size=1, max_size=9),
        "seq_length": st.integers(1, 5),
        "sequences_per_batch": st.integers(1, 40),
        "shuffle_window": st.integers(1, 12),
        "seed": st.integers(0, 2**63),
        "shuffle": st.booleans(),
    }
)


@given(cases, st.integers(1, 3))
@settings(max_examples=150)
def test_every_sequence_once_per_epoch_and_batches_continue_across_epochs(case, epochs):
    batches = make(**case)
    wanted = sequences(case["lengths"], case["seq_length"])
    total, size = len(wanted) * epochs, case["sequences_per_batch"]
    assert batches.sequences_per_epoch == len(wanted)
    rows = np.concatenate([batches.rows(step) for step in range(-(-total // size))])
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(case["seq_length"] + 1), (len(rows), 1)))
    for epoch in range(epochs):
        firsts = rows[epoch * len(wanted) : (epoch + 1) * len(wanted), 0].tolist()
        assert sorted(firsts) == wanted
        if not case["shuffle"]:
            assert firsts == wanted


@given(cases, st.data())
@settings(max_examples=60)
def test_drop_last_leaves_out_only_the_last_sequences(case, data):
    whole = len(sequences(case["lengths"], case["seq_length"])) // case["sequences_per_batch"]
    if not whole:
        with pytest.raises(UserError, match="drop_last leaves nothing"):
            make(**case, drop_last=True)
        return
    batches, through = make(**case, drop_last=True), make(**case)
    epoch = data.draw(st.integers(0, 2))
    rows = np.concatenate([batches.rows(epoch * whole + step) for step in range(whole)])
    assert max(Counter(rows[:, 0].tolist()).values()) == 1
    if epoch == 0:
        np.testing.assert_array_equal(rows, np.concatenate([through.rows(step) for step in range(whole)]))


@given(cases, st.integers(0, 10**12), st.integers(1, 7), st.randoms())
@settings(max_examples=100)
def test_rows_of_all_processes_make_up_the_global_batch(case, step, processes, random):
    whole, size = make(**case).rows(step), case["sequences_per_batch"]
    edges = sorted(random.randint(0, size) for _ in range(processes - 1))
    parts = [make(**case).rows(step, slice(a, b)) for a, b in zip([0, *edges], [*edges, size], strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    chosen = np.array([random.randrange(size) for _ in range(5)])
    np.testing.assert_array_equal(make(**case).rows(step, chosen), whole[chosen])


@given(cases)
@settings(max_examples=30)
def test_batch_does_not_depend_on_earlier_calls(case):
    batches = make(**case)
    forward = [batches.rows(step) for step in range(12)]
    for step in (7, 0, 11, 3):
        np.testing.assert_array_equal(batches.rows(step), forward[step])
        np.testing.assert_array_equal(make(**case).rows(step), forward[step])


# A run of several lives, each with another batch size: (sequences in a batch, batches).
lives = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), min_size=2, max_size=6)


@given(cases, lives)
@settings(max_examples=100)
def test_a_run_whose_batch_size_changes_neither_repeats_nor_skips_a_sequence(case, lives):
    case.pop("sequences_per_batch")
    rows, start = [], 0
    for size, steps in lives:
        batches = make(**case, sequences_per_batch=size, start=start, steps=steps)
        rows += [batches.rows(step) for step in range(steps)]
        start = batches.position(steps)
    assert start == sum(size * steps for size, steps in lives)
    if start:
        np.testing.assert_array_equal(np.concatenate(rows), make(**case, sequences_per_batch=start).rows(0))


@given(cases, lives)
@settings(max_examples=100)
def test_with_drop_last_a_changed_batch_size_skips_only_incomplete_batches(case, lives):
    case.pop("sequences_per_batch")
    epoch = len(sequences(case["lengths"], case["seq_length"]))
    order = make(**case, sequences_per_batch=epoch * (1 + sum(steps for _, steps in lives))).rows(0)
    start, passed = 0, 0
    for size, steps in lives:
        size = min(size, epoch)
        batches = make(**case, sequences_per_batch=size, start=start, steps=steps, drop_last=True)
        for step in range(steps):
            if passed % epoch + size > epoch:
                passed += epoch - passed % epoch
            np.testing.assert_array_equal(batches.rows(step), order[passed : passed + size])
            passed += size
            assert batches.position(step + 1) == passed
        start = batches.position(steps)


@given(cases, st.integers(0, 500), st.integers(0, 8), st.booleans())
@settings(max_examples=60)
def test_a_restart_at_any_step_changes_no_batch(case, start, steps, drop_last):
    case["sequences_per_batch"] = min(case["sequences_per_batch"], len(sequences(case["lengths"], case["seq_length"])))
    whole = make(**case, start=start, drop_last=drop_last)
    resumed = make(**case, start=whole.position(steps), drop_last=drop_last)
    for step in range(6):
        np.testing.assert_array_equal(resumed.rows(step), whole.rows(steps + step))


@given(cases, st.integers(0, 3))
@settings(max_examples=60)
def test_data_that_are_read_once_end_with_padding(case, more):
    count = len(sequences(case["lengths"], case["seq_length"]))
    batches, size = make(**case, once=True, steps=99), case["sequences_per_batch"]
    rows = np.concatenate([batches.rows(step) for step in range(-(-count // size) + more)])
    assert len(rows) % size == 0
    assert (rows[count:] == PADDING).all()
    np.testing.assert_array_equal(rows[:count], make(**case | {"sequences_per_batch": count}).rows(0))


@pytest.mark.parametrize("shards", [1, 6])
def test_seeds_and_epochs_differ(shards):
    lengths = [400] * shards
    orders = {
        (seed, epoch): tuple(make(lengths, seed=seed, sequences_per_batch=shards * 133).rows(epoch)[:, 0].tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


def test_window_bounds_the_shards_in_use_and_their_order_is_shuffled():
    lengths = [301] * 12
    firsts = make(lengths, sequences_per_batch=1200, shuffle_window=3).rows(0)[:, 0]
    windows = [set((part // 301).tolist()) for part in np.split(firsts, 4)]
    assert [len(window) for window in windows] == [3] * 4
    assert windows != [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}]
    # Within a window the shards are mixed evenly: each tenth of it has sequences of all three.
    assert all(len(set((part // 301).tolist())) == 3 for part in np.split(firsts[:300], 10))


@pytest.mark.parametrize("lengths", [[5], [6, 6]])
def test_batch_larger_than_the_dataset_wraps(lengths):
    rows = make(lengths, sequences_per_batch=50, seq_length=4).rows(3)
    assert rows.shape == (50, 5)
    counts = Counter(rows[:, 0].tolist()).values()
    assert max(counts) - min(counts) <= 1


def test_negative_step_and_row_out_of_range():
    with pytest.raises(ValueError, match="step=-1"):
        make([60]).rows(-1)
    with pytest.raises(IndexError):
        make([60]).rows(0, np.array([4]))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=100)
def test_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permutation_never_changes_and_looks_random():
    """The first line is a golden value: if it changes, runs cannot be resumed in their order."""
    assert permute(np.arange(10), 10, key_of(1, 2, 3)).tolist() == [8, 9, 5, 3, 2, 1, 6, 7, 4, 0]
    size = 1000
    orders = np.array([permute(np.arange(size), size, key_of(5, number)) for number in range(200)])
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.02
    assert (orders == np.arange(size)).sum() == pytest.approx(200, abs=60)  # one fixed point each, on average
    cells = sum(np.histogram2d(np.arange(size), order, bins=10)[0] for order in orders)
    assert ((cells - cells.mean()) ** 2 / cells.mean()).sum() / 81 < 1.5
    np.testing.assert_array_equal(
        permute(np.array([10**12]), 10**12 + 1, 7), permute(np.array([10**12]), 10**12 + 1, 7)
    )


def test_real_shards_give_real_text(shared, write_shards):
    tokens = np.fromfile(shared("text/en/openwebtext_val_gpt2_uint16.bin"), np.uint16)
    folder = write_shards(*np.array_split(tokens, 5))
    dataset = open_dataset(folder, 128, 50257)
    batches = Batches(dataset, sequences_per_batch=8, seq_length=128, seed=1, shuffle=False)
    np.testing.assert_array_equal(batches.rows(0).ravel()[:129], tokens[:129])
    np.testing.assert_array_equal(batches.rows(2)[3], tokens[19 * 128 : 20 * 128 + 1])
    shuffled = Batches(dataset, sequences_per_batch=batches.sequences_per_epoch, seq_length=128, seed=1).rows(0)
    assert len(np.unique(shuffled, axis=0)) > 0.99 * batches.sequences_per_epoch


def test_rows_are_copied_without_a_loop_over_tokens(write_shards):
    """A loop over tokens in Python would take seconds; this takes milliseconds."""
    folder = write_shards(np.zeros(4_000_001, np.uint16))
    batches = Batches(open_dataset(folder, 1024, 2), sequences_per_batch=512, seq_length=1024, seed=1)
    batches.rows(0)
    begin = time.perf_counter()
    for step in range(10):
        batches.rows(step)
    assert 10 * 512 * 1024 / (time.perf_counter() - begin) > 20e6
