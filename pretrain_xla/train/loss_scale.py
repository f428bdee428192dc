"""Dynamic loss scaling for fp16, without a host synchronisation.

fp16 gradients underflow, so the loss is multiplied by a scale and the gradients are divided by it. If one overflows, the update
is skipped (`update_guard.py`) and the scale halved; after `GROWTH_INTERVAL` steps without overflow it doubles (Micikevicius et
al. 2018, section 3.2). Ours stays next to `torch.amp.GradScaler` because that one decides on the host; here it is done on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class LossScale:
    """scale: 0-d float32. good_steps: 0-d int32, steps since the last change. Both are on `device` and in every checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that the next step depends on."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients divided by the scale."""
        return list(torch._foreach_mul(list(gradients), 1.0 / self.scale))

    @torch.no_grad()
    def adjust(self, skip: Tensor, overflow: Tensor) -> None:
        """Halve the scale after an overflow, double it after `GROWTH_INTERVAL` steps without one.

        Args:
            skip: whether the update is skipped, for any reason; without an overflow nothing changes then.
            overflow: whether the gradients overflowed, though the loss did not.
        """
        good_steps = torch.where(overflow, 0, self.good_steps + torch.where(skip, 0, 1))
        grow = good_steps >= GROWTH_INTERVAL
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.copy_(torch.where(grow, 0, good_steps))
