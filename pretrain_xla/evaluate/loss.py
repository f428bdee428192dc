"""Mean loss over a fixed set of batches, summed on the device and read once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_xla.data.batches import Batches
from pretrain_xla.data.prefetch import pipeline
from pretrain_xla.runtime import Runtime


class ValidationLoss:
    """Evaluates a model on batches 0 … `steps` - 1, the same at every call."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Tensor],
        batches: Batches,
        runtime: Runtime,
        steps: int,
        prefetch: int,
    ) -> None:
        self.model, self.batches, self.runtime = model, batches, runtime
        # The last batch may run over the end of the data into its beginning; more than that would count tokens twice.
        self.steps = min(steps, -(-batches.sequences_per_epoch // batches.sequences_per_batch))
        self._rows = runtime.rows(batches.sequences_per_batch)
        self._prefetch = prefetch

        @torch.no_grad()
        def validation(tokens_B1S: Tensor, total: Tensor) -> Tensor:
            tokens_BS = tokens_B1S[:, 0]
            return total + runtime.mean(forward(tokens_BS[:, :-1], tokens_BS[:, 1:]))

        self._step = runtime.compile(validation, "validation", state=tuple)

    def __call__(self, progress: Callable[[int], None] | None = None) -> float:
        """Mean cross-entropy in nats per token. Waits for the device once, at the end."""
        total = self.runtime.place_like(torch.zeros(()), None)
        was_training = self.model.training
        self.model.eval()
        place = self.runtime.place_batch
        with pipeline(self._read, place, 0, self.steps, self._prefetch, self.batches.threads) as batches:
            for index, tokens in enumerate(batches):
                total = self._step(tokens, total)
                if progress is not None:
                    progress(index + 1)
        self.model.train(was_training)
        return float(self.runtime.fetch(total).result()) / self.steps

    def _read(self, step: int) -> np.ndarray:
        return self.batches.rows(step, self._rows)[:, None, :]
