"""Mean loss over a fixed set of sequences, each counted once for any batch size.

The sums of each batch are added on the host in double precision: a running sum in fp32 would be wrong in the fifth digit after
some ten thousand batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_xla.data.batches import Batches
from pretrain_xla.data.prefetch import pipeline
from pretrain_xla.errors import UserError
from pretrain_xla.model.documents import Examples
from pretrain_xla.runtime import Runtime

FETCHED_BATCHES = 256
"""Batches whose sums are fetched together, while the device continues."""


class ValidationLoss:
    """Evaluates a model on the first `steps` batches of one epoch, the same at every call."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Tensor],
        batches: Batches,
        runtime: Runtime,
        steps: int,
        prefetch: int,
        examples: Examples | None = None,
    ) -> None:
        assert batches.once, "a batch that continues into the next epoch would count sequences twice"
        self.model, self.batches, self.runtime = model, batches, runtime
        examples = dataclasses.replace(examples or Examples(), padded=True)
        self.steps = min(steps, -(-batches.sequences_per_epoch // batches.sequences_per_batch))
        self._rows = runtime.rows(batches.sequences_per_batch)
        self._prefetch = prefetch

        @torch.no_grad()
        def validation(tokens_B1S: Tensor, sums_N2: Tensor) -> Tensor:
            tokens_BS = tokens_B1S[:, 0]
            loss, counted = examples.loss(forward, tokens_BS), examples.counted(tokens_BS)
            assert counted is not None  # since they are padded
            sums_2 = torch.stack([runtime.mean(loss), runtime.mean(counted)])
            return torch.cat([sums_N2[1:], sums_2[None]])

        self._step = runtime.compile(validation, "validation", state=tuple)

    def __call__(self, progress: Callable[[int], None] | None = None) -> float:
        """Mean cross-entropy in nats per counted token. Waits for the device once, at the end.

        Raises:
            UserError: no token is counted.
        """
        group = min(self.steps, FETCHED_BATCHES)
        sums_N2 = self.runtime.place_like(torch.zeros(group, 2), None)
        fetches: list[tuple[Future[Tensor], int]] = []
        was_training = self.model.training
        self.model.eval()
        place = self.runtime.place_batch
        with pipeline(self._read, place, 0, self.steps, self._prefetch, self.batches.threads) as batches:
            for done, tokens in enumerate(batches, start=1):
                sums_N2 = self._step(tokens, sums_N2)
                if done % group == 0 or done == self.steps:
                    fetches.append((self.runtime.fetch(sums_N2), (done - 1) % group + 1))
                if progress is not None:
                    progress(done)
        self.model.train(was_training)
        sums = [pair for future, count in fetches for pair in future.result()[-count:].tolist()]
        loss, counted = (math.fsum(column) for column in zip(*sums, strict=True))
        if not counted:
            directory = self.batches.dataset.directory
            raise UserError(f"{directory}: loss_ignore_tokens leaves no token to predict: name fewer")
        return loss / counted

    def _read(self, step: int) -> np.ndarray:
        return self.batches.rows(step, self._rows)[:, None, :]
