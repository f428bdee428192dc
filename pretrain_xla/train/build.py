"""The model and the optimizer of a run, as the trainer and preflight both make them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pretrain_xla.config import RunConfig
from pretrain_xla.model import GPT, Execution
from pretrain_xla.optim import AdamW, learning_rate
from pretrain_xla.runtime import Runtime


def build_model(config: RunConfig, runtime: Runtime) -> GPT:
    """The model on the current default device, its weights not yet set, run in the way that the config and machine ask for."""
    train = config.train
    execution = Execution(train.rematerialization, train.scan_layers, train.loss_chunk, runtime.loop, runtime.fence)
    return GPT(config.model, runtime.compute_dtype, execution)


def build_optimizer(config: RunConfig, model: GPT, place: Callable[[str, Tensor], Tensor]) -> AdamW:
    """The optimizer over a placed model; `place` makes each tensor of its state, by name and parameter."""
    width = config.model.d_model
    return AdamW(
        model.named_parameters(), config.optim, lambda step: learning_rate(step, config.optim, width), place=place
    )
