"""Learning rate as a function of the step, on the device.

The step and the result are device tensors: a Python number would be a constant of the graph, and each step would recompile.
For the same reason no schedule branches on the step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain_xla.config import OptimConfig


def learning_rate(step: Tensor, config: OptimConfig, d_model: int) -> Tensor:
    """Learning rate of a step.

    Args:
        step: 0-d integer tensor, number of updates before this one (0 for the first).
        config: decay method, peak, warm-up, floor.
        d_model: model width, used by noam only ("Attention Is All You Need", equation 3).

    Returns:
        0-d float32 tensor. During warm-up it is `learning_rate * (step + 1) / warmup_steps`, so the first update is not zero.
    """
    position = step.to(torch.float32) + 1.0
    if config.decay_method == "noam":
        curve = torch.minimum(position.rsqrt(), position * config.warmup_steps**-1.5)
        return curve * (config.learning_rate * d_model**-0.5)

    floor = config.floor
    if config.decay_method == "constant":
        factor = torch.ones_like(position)
    else:
        length = config.cooldown if config.decay_method == "wsd" else config.decay_steps - config.warmup_steps
        done = ((position - (config.decay_steps - length)) / max(length, 1)).clamp(0.0, 1.0)
        fall = 0.5 * (1.0 + torch.cos(math.pi * done)) if config.decay_method == "cosine" else 1.0 - done
        factor = floor + (1.0 - floor) * fall
    warmup = (position / max(config.warmup_steps, 1)).clamp(max=1.0)
    return config.learning_rate * warmup * factor
