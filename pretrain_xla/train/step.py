"""One training step: (state, batch) → metrics, with everything inside that belongs to an update.

On XLA this function is traced and compiled whole. Nothing in it reads a tensor on the host; the step number, the learning rate
and the metrics are device values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.model import GPT
from pretrain_xla.model.documents import Examples
from pretrain_xla.optim import Optimizer
from pretrain_xla.optim.clipping import clip_by_global_norm
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.loss_scale import LossScale

METRICS = ("loss", "grad_norm", "learning_rate")
"""Columns of the history, in order."""


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a pure function of the run's seed and the step, so that a resumed run draws the same."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**62


class TrainStep:
    """Forward, backward, accumulation, reduction, clipping, schedule and update.

    The metrics of the last `log_interval` steps pass through the step as one `[log_interval, len(METRICS)]` tensor, so one
    transfer copies them all to the host. Each step returns a new tensor (none is updated in place), because a thread may still
    be reading an older one.
    """

    def __init__(
        self, model: GPT, optimizer: Optimizer, runtime: Runtime, config: RunConfig, examples: Examples | None = None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.runtime = runtime
        self.examples = examples or Examples()
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss_scale = LossScale(runtime.device) if config.train.mixed_precision == "fp16" else None
        self.forward = runtime.forward(model)
        self._update = runtime.fuse(self._clip_and_update)

    def state(self) -> Iterator[Tensor]:
        """Every tensor that the step changes in place."""
        yield from self.model.parameters()
        yield from self.optimizer.state.values()
        if self.loss_scale is not None:
            yield from self.loss_scale.state.values()

    def named_state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by the names that it has in a checkpoint."""
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state.items()}
        if self.loss_scale is not None:
            tensors |= {f"loss_scale.{name}": value for name, value in self.loss_scale.state.items()}
        return tensors

    def __call__(self, tokens_BAS: Tensor, history_NM: Tensor) -> Tensor:
        """Make one update in place.

        Args:
            tokens_BAS: int32 `[rows, micro-batches, T + 1]`; S = T + 1, inputs and targets overlap by T - 1.
            history_NM: metrics of the last N steps, newest last.

        Returns:
            The history with this step's metrics at its end.
        """
        scale = None if self.loss_scale is None else self.loss_scale.scale
        parameters = dict(zip(self.optimizer.names, self.optimizer.parameters, strict=True))
        total, gradients = self.runtime.gradients(self.examples.loss, self.forward, parameters, tokens_BAS, scale)
        missing = [name for name, g in zip(self.optimizer.names, gradients, strict=True) if g is None]
        assert not missing, f"no gradient reached {missing}"
        loss, counted = self.runtime.mean(total), self.examples.counted(tokens_BAS)
        if counted is not None:
            # Micro-batches and replicas may each count a different share of their targets. If none counts, 0 / 1e-12 is 0.
            counted = self.runtime.mean(counted).clamp(min=1e-12)
            loss = loss / counted
        norm, rate = self._update(gradients, counted)
        metrics_M = torch.stack([loss, norm, rate])
        return torch.cat([history_NM[1:], metrics_M[None]])

    def _clip_and_update(self, gradients: list[Tensor], counted: Tensor | None) -> tuple[Tensor, Tensor]:
        overflow: Tensor | None = None
        if self.loss_scale is not None:
            gradients, overflow = self.loss_scale.unscale(gradients)
        gradients, norm = clip_by_global_norm(gradients, self.max_grad_norm, counted)
        rate = self.optimizer.update(gradients, skip=overflow)
        if self.loss_scale is not None and overflow is not None:
            self.loss_scale.adjust(overflow)
        return norm, rate
