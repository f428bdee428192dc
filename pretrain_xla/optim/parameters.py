"""Which group a parameter belongs to, by a table of names, as `runtime/sharding.py` has one for shardings.

A group has a rule (AdamW, or Muon for the matrices of the blocks), a learning rate, betas and a weight decay of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from pretrain_xla.config import OptimConfig

Group = Literal["embedding", "head", "matrix", "scalar"]

GROUPS: dict[str, Group] = {
    "embedding.weight": "embedding",
    "position_embedding.weight": "embedding",
    "head.weight": "head",
    "*norm.weight": "scalar",
    "*.bias": "scalar",
    "blocks.*.weight": "matrix",
}
"""Pattern (`fnmatch`) → group; the first match wins, and every parameter must match one. A tied embedding is `embedding`."""

Place = Callable[[str, torch.Size, Tensor], Tensor]
"""(name, shape, parameter) → a tensor of the optimizer's state on the devices: saved or zero, int32 for `step` and fp32 for
all else, sharded as the parameter where it has its shape, else replicated."""


@dataclass(frozen=True)
class GroupSettings:
    """How the parameters of a group are updated. rate_factor: of the schedule's learning rate."""

    rate_factor: float
    betas: tuple[float, float]
    weight_decay: float


def group_of(name: str) -> Group:
    """The group of a parameter.

    Raises:
        KeyError: the table has no row for it (a defect of ours).
    """
    for pattern, group in GROUPS.items():
        if fnmatchcase(name, pattern):
            return group
    raise KeyError(f"no row for parameter {name!r} in optim/parameters.py")


def width_factor(group: Group, config: OptimConfig, d_model: int | None) -> float:
    """Factor on a group's learning rate at a width, so that the best rate at `base_d_model` is the best at every width.

    AdamW moves every weight by about the learning rate, and an output of a matrix sums over its inputs. The output would move
    more the wider the model, so that this learning rate is divided by the ratio of the widths (Yang et al. 2022, table 8). An
    embedding's row and a norm's weight are not summed over. Muon's update moves the output as much at every width if its scale
    is `original`; `match_rms_adamw` grows with the square root of the width. This holds for an untied head, `init: mup`
    or `fan_in`, and attention heads of one size at all widths.
    """
    ratio = d_model / config.base_d_model if d_model and config.base_d_model else 1.0
    if group in ("embedding", "scalar"):
        return 1.0
    if group == "matrix" and config.optim_type == "muon":
        return 1.0 if config.muon_scale == "original" else 1.0 / math.sqrt(ratio)
    return 1.0 / ratio


def group_settings(group: Group, config: OptimConfig, d_model: int | None) -> GroupSettings:
    """Settings of a group at a width: its own where the config has them, else those of all.

    The product of learning rate and decoupled weight decay, which sets for how many steps a weight remembers an update, is the
    same at every width (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698).
    """
    rate, betas, decay = config.learning_rate, config.betas, config.weight_decay
    if group == "embedding":
        rate, betas = config.embedding_learning_rate or rate, config.embedding_betas or betas
    elif group == "head":
        rate, betas = config.head_learning_rate or rate, config.head_betas or betas
    elif group == "scalar":
        rate, betas, decay = config.scalar_learning_rate or rate, config.scalar_betas or betas, 0.0
    if group in ("embedding", "head") and config.embedding_weight_decay is not None:
        decay = config.embedding_weight_decay
    factor = width_factor(group, config, d_model)
    decay = decay if config.optim_type == "adam" else decay / factor
    return GroupSettings(rate / config.learning_rate * factor, betas, decay)


def scheduled_decay(decay: float, rate: Tensor, config: OptimConfig) -> Tensor | float:
    """A weight decay at a learning rate of the schedule, by `weight_decay_schedule`."""
    return decay if config.weight_decay_schedule == "constant" else decay * (rate / config.learning_rate)


def zeros(name: str, shape: torch.Size, parameter: Tensor) -> Tensor:
    """A `Place` for a new run on one device."""
    dtype = torch.int32 if name == "step" else torch.float32
    return torch.zeros(shape, dtype=dtype, device=parameter.device)
