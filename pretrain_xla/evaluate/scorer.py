"""Log-probabilities of given tokens, each conditioned on those before it; every score is computed from them.

Shapes are static. Rows are padded on the right (attention is causal, so padding is never attended to) to one of a few lengths,
powers of two up to `seq_length`; incomplete batches are padded with rows that are not counted. So there is one graph for each
length, for any number of rows. Batches of shorter rows have more rows, so that all have about the same number of tokens.

Every process computes its own rows of a batch, on a mesh or under DDP, and gets all results. The host reads results a few
batches late, so that the device does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain_xla.data.prefetch import Prefetcher
from pretrain_xla.errors import UserError
from pretrain_xla.model import GPT
from pretrain_xla.model.loss import IGNORED
from pretrain_xla.runtime import Runtime

SHORTEST = 32
"""Shortest padded length; shorter rows would not use the device well."""
LOGITS_AT_ONCE = 2**27
"""Logits that one device computes at a time (0.5 GB in fp32); larger batches are scored in chunks."""
AHEAD = 2
"""Batches packed and copied to the device ahead of their use."""
BEHIND = 4
"""Batches that may still be running on the device when an earlier one's results are read."""


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens of which those from `start` on are scored.

    tokens: int32 [S], at most `seq_length` + 1. start: at least 1, because nothing precedes the first token. lost: tokens that
    were truncated on the left.
    """

    tokens: np.ndarray
    start: int
    lost: int = 0

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Score:
    """Score of a row. logprob: sum over its `count` scored tokens, in nats. hits: for each k, how many are in the top k."""

    logprob: float
    count: int
    hits: tuple[int, ...]

    @property
    def greedy(self) -> bool:
        """Whether every scored token is the most likely one (`hits` starts with k = 1)."""
        return self.hits[0] == self.count


class Scorer:
    """Scores rows with a model on its device.

    Args:
        model: prepared by `runtime.prepare_model`.
        runtime: where it runs.
        batch_size: rows of full length in a batch, over all devices; rounded up to a multiple of the devices that split it.
        top_k: each k for which hits are counted, besides 1.

    Attributes:
        top_k: each k of `Score.hits`, ascending, 1 first.
    """

    def __init__(self, model: GPT, runtime: Runtime, batch_size: int, top_k: Iterable[int] = ()) -> None:
        self._model, self._runtime = model, runtime
        self.top_k = tuple(sorted({1, *top_k}))
        if self.top_k[-1] > model.config.vocab_size:
            raise UserError(f"top_k {self.top_k[-1]}: the model has only {model.config.vocab_size} tokens: take fewer")
        self.max_length = model.config.seq_length
        self.lengths = _lengths(self.max_length)
        self._shards = runtime.mesh["data"] * runtime.mesh.get("fsdp", 1)
        self._tokens_per_batch = batch_size * self.max_length
        # One function for each length: the graph guard allows one graph for each function.
        self._steps = {
            length: runtime.compile(self._score, f"evaluate {length}", state=tuple) for length in self.lengths
        }

    def __call__(self, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> list[Score]:
        """Score rows; results are in the same order.

        Args:
            rows: the same on every process.
            progress: called with the number of rows done so far.
        """
        scores: list[Score | None] = [None] * len(rows)
        pending: deque[tuple[Sequence[int], Future[Tensor]]] = deque()
        done = 0

        def read(leave: int) -> None:
            nonlocal done
            while len(pending) > leave:
                indices, future = pending.popleft()
                values_RK = future.result()[: len(indices)].tolist()
                for index, (logprob, *hits) in zip(indices, values_RK, strict=True):
                    scores[index] = Score(logprob, rows[index].count, tuple(int(hit) for hit in hits))
                done += len(indices)
                if progress is not None:
                    progress(done)

        plan = self._plan(rows)
        was_training = self._model.training
        self._model.eval()
        with (
            self._runtime.planned(),
            Prefetcher(lambda step: self._pack(rows, *plan[step]), 0, len(plan), AHEAD) as packed,
        ):
            for (length, indices), batch_R2T in zip(plan, packed, strict=True):
                pending.append((indices, self._runtime.fetch(self._steps[length](batch_R2T))))
                read(leave=BEHIND)
            read(leave=0)
        self._model.train(was_training)
        return [score for score in scores if score is not None]

    def rows_in_batch(self, length: int) -> int:
        """Rows in a batch of this padded length, over all devices."""
        rows = self._tokens_per_batch // length
        return -(-rows // self._shards) * self._shards

    def _plan(self, rows: Sequence[Row]) -> list[tuple[int, Sequence[int]]]:
        """Batches as (padded length, row indices), the longest first, so that running out of memory happens at once."""
        by_length: dict[int, list[int]] = {length: [] for length in self.lengths}
        for index, row in enumerate(rows):
            inputs = len(row.tokens) - 1
            assert 1 <= row.start <= inputs <= self.max_length, (row.start, inputs, self.max_length)
            by_length[next(length for length in self.lengths if length >= inputs)].append(index)
        plan: list[tuple[int, Sequence[int]]] = []
        for length, indices in sorted(by_length.items(), reverse=True):
            size = self.rows_in_batch(length)
            plan += [(length, indices[start : start + size]) for start in range(0, len(indices), size)]
        return plan

    def _pack(self, rows: Sequence[Row], length: int, indices: Sequence[int]) -> Tensor:
        """This process's rows of a batch on the device: inputs and targets, int32 [R, 2, T]."""
        size = self.rows_in_batch(length)
        packed_R2T = np.zeros((size, 2, length), np.int32)
        packed_R2T[:, 1] = IGNORED
        for place, index in enumerate(indices):
            row = rows[index]
            inputs = len(row.tokens) - 1
            packed_R2T[place, 0, :inputs] = row.tokens[:-1]
            packed_R2T[place, 1, row.start - 1 : inputs] = row.tokens[row.start :]
        return self._runtime.place_batch(packed_R2T[self._runtime.rows(size)])

    @torch.no_grad()
    def _score(self, batch_R2T: Tensor) -> Tensor:
        """Summed log-probability and hits for each k, of all rows of the global batch: fp32 [rows, 1 + len(top_k)]."""
        targets_RT = batch_R2T[:, 1]
        x_RTD = self._model.hidden(batch_R2T[:, 0])
        per_device = self.rows_in_batch(x_RTD.shape[1]) // self._shards
        chunk = max(LOGITS_AT_ONCE // (per_device * self._model.config.padded_vocab_size), 1)
        chunks = zip(x_RTD.split(chunk, dim=1), targets_RT.split(chunk, dim=1), strict=True)
        sums_RK = torch.stack([self._sums(self._model.logits(x), targets) for x, targets in chunks]).sum(0)
        return self._runtime.all_rows(sums_RK)

    def _sums(self, logits_RTV: Tensor, targets_RT: Tensor) -> Tensor:
        valid_RT = targets_RT != IGNORED
        ids_RT1 = targets_RT.clamp(min=0).long()[..., None]
        target_RT1 = logits_RTV.gather(-1, ids_RT1)
        logprobs_RT = target_RT1[..., 0] - torch.logsumexp(logits_RTV, dim=-1)
        # Of equal logits (common in bf16), the first ranks higher, as in argmax.
        before_V = torch.arange(logits_RTV.shape[-1], device=logits_RTV.device) < ids_RT1
        rank_RT = ((logits_RTV > target_RT1) | ((logits_RTV == target_RT1) & before_V)).sum(-1)
        columns = [torch.where(valid_RT, logprobs_RT, 0.0)]
        # No logit compares greater than NaN, so without this every token of a broken model would rank first.
        counts_RT = valid_RT & logprobs_RT.isfinite()
        columns += [(counts_RT & (rank_RT < k)).float() for k in self.top_k]
        return torch.stack([column_RT.sum(-1) for column_RT in columns], dim=-1)


def _lengths(longest: int) -> tuple[int, ...]:
    """Padded lengths: powers of two from `SHORTEST`, and `longest`."""
    lengths = [SHORTEST << power for power in range(longest.bit_length())]
    return (*(length for length in lengths if length < longest), longest)
