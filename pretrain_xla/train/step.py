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
from pretrain_xla.optim.clipping import clip_by_global_norm, squared_norms
from pretrain_xla.runtime import Runtime
from pretrain_xla.train.loss_scale import LossScale
from pretrain_xla.train.update_guard import UpdateGuard

METRICS = ("loss", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row")
"""Columns of the history, in order. skipped: 1 if the update was skipped, else 0."""


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a pure function of the run's seed and the step, so that a resumed run draws the same."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**62


class TrainStep:
    """Forward, backward, accumulation, reduction, clipping, schedule and update.

    A step whose loss or gradient is NaN or infinite changes nothing but the counters of `guard`.

    The metrics of the last `log_interval` steps pass through the step as one `[log_interval, len(METRICS)]` tensor, so one
    transfer copies them all to the host. Each step returns a new tensor (none is updated in place), because a thread may still
    be reading an older one.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        runtime: Runtime,
        config: RunConfig,
        examples: Examples | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.runtime = runtime
        self.examples = examples or Examples()
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss_scale = LossScale(runtime.device) if config.train.mixed_precision == "fp16" else None
        self.guard = UpdateGuard(optimizer.names, config.train, lambda _name, new: runtime.place_like(new, None))
        self.forward = runtime.forward(model)
        self._update = runtime.fuse(self._clip_and_update)

    def state(self) -> Iterator[Tensor]:
        """Every tensor that the step changes in place."""
        yield from self.model.parameters()
        yield from self.optimizer.state.values()
        yield from self.guard.state.values()
        yield from self.guard.diagnosis.values()
        if self.loss_scale is not None:
            yield from self.loss_scale.state.values()

    def named_state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by the names that it has in a checkpoint."""
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state.items()}
        tensors |= {f"guard.{name}": value for name, value in self.guard.state.items()}
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
        metrics_M = self._update(loss, gradients, counted)
        return torch.cat([history_NM[1:], metrics_M[None]])

    def _clip_and_update(self, loss: Tensor, gradients: list[Tensor], counted: Tensor | None) -> Tensor:
        """The update, or none; returns the step's metrics `[len(METRICS)]`."""
        scale = None if self.loss_scale is None else self.loss_scale.scale
        if self.loss_scale is not None:
            gradients = self.loss_scale.unscale(gradients)
        squares_P = squared_norms(gradients)
        gradients, norm = clip_by_global_norm(gradients, self.max_grad_norm, counted, squares_P)
        skip, in_a_row = self.guard.decide(loss.detach(), norm, squares_P, scale)
        rate = self.optimizer.update(gradients, skip)
        if self.loss_scale is not None:
            self.loss_scale.adjust(skip, torch.isfinite(loss.detach()) & ~torch.isfinite(norm))
        return torch.stack([loss.detach(), norm, rate, skip.float(), in_a_row.float()])
