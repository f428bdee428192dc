"""Mean loss over a fixed set of batches, summed on the device and read once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_xla.data.batches import Batches
from pretrain_xla.data.prefetch import pipeline
from pretrain_xla.errors import UserError
from pretrain_xla.model.documents import Examples
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
        examples: Examples | None = None,
    ) -> None:
        self.model, self.batches, self.runtime = model, batches, runtime
        examples = examples or Examples()
        # The last batch may run over the end of the data into its beginning; more than that would count tokens twice.
        self.steps = min(steps, -(-batches.sequences_per_epoch // batches.sequences_per_batch))
        self._rows = runtime.rows(batches.sequences_per_batch)
        self._prefetch = prefetch

        @torch.no_grad()
        def validation(tokens_B1S: Tensor, totals_2: Tensor) -> Tensor:
            tokens_BS = tokens_B1S[:, 0]
            loss, counted = examples.loss(forward, tokens_BS), examples.counted(tokens_BS)
            counted = torch.ones_like(loss) if counted is None else counted
            return totals_2 + torch.stack([runtime.mean(loss), runtime.mean(counted)])

        self._step = runtime.compile(validation, "validation", state=tuple)

    def __call__(self, progress: Callable[[int], None] | None = None) -> float:
        """Mean cross-entropy in nats per token that counts. Waits for the device once, at the end.

        Raises:
            UserError: none counts.
        """
        totals_2 = self.runtime.place_like(torch.zeros(2), None)
        was_training = self.model.training
        self.model.eval()
        place = self.runtime.place_batch
        with pipeline(self._read, place, 0, self.steps, self._prefetch, self.batches.threads) as batches:
            for index, tokens in enumerate(batches):
                totals_2 = self._step(tokens, totals_2)
                if progress is not None:
                    progress(index + 1)
        self.model.train(was_training)
        loss, counted = self.runtime.fetch(totals_2).result().tolist()
        if not counted:
            directory = self.batches.dataset.directory
            raise UserError(f"{directory}: loss_ignore_tokens leaves no token to predict: name fewer")
        return float(loss / counted)

    def _read(self, step: int) -> np.ndarray:
        return self.batches.rows(step, self._rows)[:, None, :]
