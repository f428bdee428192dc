"""Which updates are skipped, decided on the device: those of a NaN or infinite loss or gradient, and on request of spikes.

A skipped update leaves parameters, moments and schedule bit for bit as they were, and the next step has the next batch. So a
batch with bad data costs itself alone, and the state is at all times that after the last good update. Nothing is read on the
host here; `skipped_updates.py` says there what was skipped, and ends a run that skips too many in a row.

The rule for spikes is that of OLMo-core's `SkipStepOptimizer` and levanter's `SkipStepConfig`: a loss or a gradient norm more
than `spike_sigma` standard deviations above the mean of the last `spike_window` steps, once half as many have been seen. Two
things differ. NaN and infinity are kept out of the window, since they would be its mean until they leave it. And a spike enters
as the limit that it exceeded: one of any height cannot hide those that follow, while a lasting change raises the limit from
step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain_xla.config import TrainConfig

EMPTY = -1.0
"""In the window: nothing yet. Neither a loss nor a norm is negative."""
LEAST_DEVIATION = 1e-6
"""So that after equal values the next is not a spike for its rounding (levanter's value)."""


class UpdateGuard:
    """Decides in each step, within the compiled step.

    Attributes:
        names: the parameters, in the order of their gradients.
        state: name → tensor; all that the next decision depends on, and in every checkpoint. `skipped_in_a_row` is 0-d int32.
            `recent` is [2, W] float32, the losses and gradient norms of the last W steps, newest last; only with `spike_sigma`.
        diagnosis: `bad_gradients`, [P] int32: for how many steps up to the last one each gradient has held NaN or infinity. It
            decides nothing, and is in no checkpoint, because the parameters are other ones where layers are stacked.

    Args:
        names: see above.
        config: of the run.
        place: (name, host tensor of a new run) → the tensor on the devices, with saved values if there are any.
    """

    def __init__(self, names: Sequence[str], config: TrainConfig, place: Callable[[str, Tensor], Tensor]) -> None:
        self.names = list(names)
        self._sigma = config.spike_sigma
        new = {"skipped_in_a_row": torch.zeros((), dtype=torch.int32)}
        if self._sigma is not None:
            new["recent"] = torch.full((2, config.spike_window), EMPTY)
        self.state = {name: place(name, tensor) for name, tensor in new.items()}
        bad_P = torch.zeros(len(self.names), dtype=torch.int32)
        self.diagnosis = {"bad_gradients": place("bad_gradients", bad_P)}

    @torch.no_grad()
    def decide(
        self, loss: Tensor, norm: Tensor, squares_P: Tensor, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Whether to skip this update, and how many have been skipped in a row with it; updates the state.

        Args:
            loss, norm: of this step, over all replicas (0-d float32). The norm is NaN or infinite if any gradient is.
            squares_P: see `squared_norms`.
            scale: fp16's loss scale. Overflows by which it is being found (above 1, of a finite loss) are skipped, but neither
                counted in the row nor do they end it. None means that there is none.

        Returns:
            0-d bool, and 0-d int32.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        skip = ~finite
        if self._sigma is not None:
            skip = skip | self._is_spike(torch.stack([loss, norm]), finite, self._sigma)
        counted = skip
        if scale is not None:
            counted = skip & ~(torch.isfinite(loss) & ~torch.isfinite(norm) & (scale > 1.0))
        row = self.state["skipped_in_a_row"]
        row.copy_(torch.where(skip, row + counted.to(torch.int32), 0))
        bad_P = self.diagnosis["bad_gradients"]
        bad_P.copy_(torch.where(torch.isfinite(squares_P), 0, bad_P + 1))
        return skip, row.clone()

    def _is_spike(self, values_2: Tensor, finite: Tensor, sigma: float) -> Tensor:
        """Whether this step's loss or norm is one (0-d bool); records both, if they are finite."""
        recent_2W = self.state["recent"]
        known_2W = recent_2W >= 0.0
        count_2 = known_2W.sum(1)
        mean_2 = torch.where(known_2W, recent_2W, 0.0).sum(1) / count_2.clamp(min=1)
        squares_2 = torch.where(known_2W, recent_2W - mean_2[:, None], 0.0).square().sum(1)
        deviation_2 = (squares_2 / (count_2 - 1).clamp(min=1)).sqrt()
        limit_2 = mean_2 + sigma * deviation_2.clamp(min=LEAST_DEVIATION)
        above_2 = (values_2 > limit_2) & (count_2 >= max(recent_2W.shape[1] // 2, 2))
        entry_2 = torch.where(above_2, limit_2, values_2)
        shifted_2W = torch.cat([recent_2W[:, 1:], entry_2[:, None]], dim=1)
        recent_2W.copy_(torch.where(finite, shifted_2W, recent_2W))
        return above_2.any()
