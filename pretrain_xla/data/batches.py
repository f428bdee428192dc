"""Which sequences make up a batch: a pure function of (dataset, seed, shuffle window, position, batch size).

A position is the number of sequences used so far, over all epochs. With the seed and window of its order, it is all that a run
has to save. A resumed run starts at the position where it ended, whatever its batch size, and another number of hosts reads
other rows of the same batches. A shard of n tokens is cut into (n - 1) // T sequences whose inputs do not overlap: sequence j
is its tokens j*T to j*T + T, the T inputs and, shifted by one, the T targets. The last target of one is the first input of the
next. Each epoch has every sequence exactly once.

The order of an epoch: shards are shuffled, then taken `shuffle_window` at a time, and all sequences of such a window are
shuffled together by a permutation that needs no memory. So reads fall in a few files at a time, which the page cache can
hold and the `shard_loader` can fetch ahead, and no array is as long as the dataset. `rows` costs about 0.3 ms and a copy of
the tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from pretrain_xla.data.dataset import TokenDataset
from pretrain_xla.data.permutation import key_of, permute
from pretrain_xla.errors import UserError

_READERS = 8  # batches read at a time, if each needs a round trip or more
_SHARD_ORDER, _SEQUENCE_ORDER = 1, 2  # so that the two never use the same key

PADDING = -1
"""Fills rows that only complete the shape of a batch."""


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of shards, S of them in W windows."""

    order: np.ndarray
    """[S] shards in their order."""
    shard_ends: np.ndarray
    """[S] sequences up to and including each shard, in that order."""
    window_starts: np.ndarray
    """[W + 1] sequences before each window, and the total."""


class Batches:
    """The batches of a dataset, in order, each of `sequences_per_batch` sequences.

    Args:
        dataset: from `open_dataset`, with the same seq_length.
        sequences_per_batch: over all processes; it may exceed the dataset, which is then read more than once.
        seq_length: T.
        seed: seed of the order.
        shuffle: if False, shards are in order of name and sequences in the order of the text, in every epoch.
        shuffle_window: shards that are shuffled together.
        drop_last: leave out the sequences at the end of an epoch that do not fill a batch; otherwise the batch continues
            with the next epoch. The position counts those that are left out, too.
        once: stop after one epoch; the last batch is filled up with rows of `PADDING`.
        start: position at which batch 0 begins.
        steps: batches that will be read; nothing beyond them is fetched ahead. None means no limit.
        share: fraction of each batch that this process reads, times how often. With `steps`, it decides whether
            remote shards are fetched whole.

    Raises:
        UserError: with drop_last, a batch is larger than an epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequences_per_batch: int,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        shuffle_window: int = 8,
        drop_last: bool = False,
        once: bool = False,
        start: int = 0,
        steps: int | None = None,
        share: float = 1.0,
    ) -> None:
        self.dataset = dataset
        self.sequences_per_batch = sequences_per_batch
        self.seq_length = seq_length
        self.once = once
        self._start, self._drop_last = start, drop_last
        self._seed, self._shuffle, self._window = seed, shuffle, shuffle_window
        self._sequences = sequences_of(dataset, seq_length)
        self.sequences_per_epoch = int(self._sequences.sum())
        """Sequences in the dataset."""
        if drop_last and self.sequences_per_epoch < sequences_per_batch:
            raise UserError(
                f"{dataset.directory}: drop_last leaves nothing: a batch of {sequences_per_batch} sequences is larger "
                f"than the dataset of {self.sequences_per_epoch}: turn drop_last off or make the batch smaller"
            )
        self._epoch = functools.lru_cache(maxsize=4)(self._plan)
        ends = [self.position(steps)] if steps is not None else []
        self._end = min([*ends, self.sequences_per_epoch] if once else ends, default=None)
        self._announced: list[tuple[int, int]] = []
        reached = 1.0 if shuffle or self._end is None else min(1.0, (self._end - start) / self.sequences_per_epoch)
        dataset.loader.choose(share * reached, shuffle_window, seq_length + 1)

    @property
    def threads(self) -> int:
        """Threads in which to call `rows`: more than one if each call waits for the network."""
        return _READERS if self.dataset.loader.ranged else 1

    def rows(self, step: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows of batch number `step`: int32 [rows, T + 1], of which `[:, :-1]` are the inputs and `[:, 1:]` the
        targets. With `once`, rows after the end of the data are `PADDING`.

        Reads only those rows. Safe to call from several threads.

        Args:
            step: number of the batch, from 0.
            rows: which of the batch's rows, 0 to sequences_per_batch; each process reads its own.

        Raises:
            UserError: a token id is outside the vocabulary, or a shard cannot be read or is damaged.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative")
        begin = self.position(step + 1) - self.sequences_per_batch
        positions = begin + np.arange(self.sequences_per_batch)[rows]
        self._announce(begin)
        there = positions < self.sequences_per_epoch
        if not self.once or there.all():
            return self._read(positions)
        tokens = np.full((len(positions), self.seq_length + 1), PADDING, np.int32)
        if there.any():
            tokens[there] = self._read(positions[there])
        return tokens

    def _read(self, positions: np.ndarray) -> np.ndarray:
        shards, sequences = self._locate(positions)
        return self.dataset.read(shards, sequences * self.seq_length, self.seq_length + 1)

    def position(self, steps: int) -> int:
        """The position after `steps` batches, where a resumed run starts."""
        return position_after(
            steps, self.sequences_per_batch, self.sequences_per_epoch, start=self._start, drop_last=self._drop_last
        )

    def _used(self, epoch: int) -> int:
        """Position up to which an epoch's sequences are in batches."""
        begin, end = epoch * self.sequences_per_epoch, (epoch + 1) * self.sequences_per_epoch
        return end - (end - max(begin, self._start)) % self.sequences_per_batch if self._drop_last else end

    def _announce(self, begin: int) -> None:
        """Tell the loader which shards the batch at this position needs, and which are next."""
        end = begin + self.sequences_per_batch
        if self.once:
            end = min(end, self.sequences_per_epoch)
        if begin >= end:
            return
        first, last = self._window_at(begin), self._window_at(end - 1)
        now = [first]
        while now[-1] != last:
            now.append(self._window_after(now[-1]))
        if now == self._announced:
            return
        after = self._window_after(last)
        begins = after[0] * self.sequences_per_epoch + int(self._epoch(after[0]).window_starts[after[1]])
        soon = [after] if self._end is None or begins < self._end else []
        self.dataset.loader.plan(self._shards_of(now), self._shards_of(soon))
        self._announced = now

    def _window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a position."""
        epoch, within = divmod(position, self.sequences_per_epoch)
        return epoch, int(np.searchsorted(self._epoch(epoch).window_starts, within, side="right")) - 1

    def _window_after(self, window: tuple[int, int]) -> tuple[int, int]:
        epoch, number = window
        starts = self._epoch(epoch).window_starts
        if number + 2 == len(starts):
            return epoch + 1, 0
        # With drop_last, the last windows may never be reached.
        reached = epoch * self.sequences_per_epoch + int(starts[number + 1]) < self._used(epoch)
        return (epoch, number + 1) if reached else (epoch + 1, 0)

    def _shards_of(self, windows: list[tuple[int, int]]) -> list[int]:
        parts = [self._epoch(epoch).order[number * self._window :][: self._window] for epoch, number in windows]
        return [shard for part in parts for shard in part.tolist()]

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index of the sequence in it) of positions."""
        epochs, within = np.divmod(positions, self.sequences_per_epoch)
        shards, sequences = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs):
            here, epoch = epochs == number, self._epoch(int(number))
            shuffled = self._shuffled(int(number), epoch, within[here])
            slots = np.searchsorted(epoch.shard_ends, shuffled, side="right")
            shards[here] = epoch.order[slots]
            sequences[here] = shuffled - (epoch.shard_ends[slots] - self._sequences[epoch.order[slots]])
        return shards, sequences

    def _shuffled(self, number: int, epoch: _Epoch, positions: np.ndarray) -> np.ndarray:
        """Positions in the epoch, permuted within their windows."""
        if not self._shuffle:
            return positions
        out = np.empty_like(positions)
        windows = np.searchsorted(epoch.window_starts, positions, side="right") - 1
        for window in np.unique(windows):
            here, start = windows == window, epoch.window_starts[window]
            size = int(epoch.window_starts[window + 1] - start)
            key = key_of(_SEQUENCE_ORDER, self._seed, number, int(window))
            out[here] = start + permute(positions[here] - start, size, key)
        return out

    def _plan(self, number: int) -> _Epoch:
        count = len(self._sequences)
        order = np.arange(count)
        if self._shuffle:
            keys = [key_of(_SHARD_ORDER, self._seed, number, shard) for shard in range(count)]
            order = np.argsort(np.array(keys, np.uint64), kind="stable")
        ends = np.cumsum(self._sequences[order])
        starts = np.concatenate([[0], ends[self._window - 1 : -1 : self._window], ends[-1:]])
        return _Epoch(order, ends, starts)


def position_after(steps: int, batch: int, epoch: int, *, start: int = 0, drop_last: bool = False) -> int:
    """Position after `steps` batches.

    Args:
        steps: number of batches.
        batch: sequences in a batch.
        epoch: sequences in the dataset; with drop_last at least those of a batch.
        start: position of the first batch. With drop_last, that is in the next epoch if it no longer fits into this one.
        drop_last: see `Batches`.
    """
    if not drop_last or not steps:
        return start + steps * batch
    # Whole batches from the start to the end of its epoch, then as many in each.
    first, each = (epoch - start % epoch) // batch, epoch // batch
    if steps <= first:
        return start + steps * batch
    epochs, last = divmod(steps - first - 1, each)
    return (start // epoch + 1 + epochs) * epoch + (last + 1) * batch


def sequences_of(dataset: TokenDataset, seq_length: int) -> np.ndarray:
    """Sequences in each shard of a dataset: int64 [S]."""
    return np.array([(shard.tokens - 1) // seq_length for shard in dataset.shards], np.int64)
