"""The optimizer as the step sees it: parameters in, one update in place, all state on the device and addressed by name.

It is made of rules (`adamw.py`, `muon.py`), each for some of the parameters, with one step counter and one schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim.adamw import AdamW
from pretrain_xla.optim.averaging import WeightAverage
from pretrain_xla.optim.matrices import MapMatrices, map_stacks
from pretrain_xla.optim.muon import Muon
from pretrain_xla.optim.parameters import Place, group_of, group_settings, zeros


class Rule(Protocol):
    """How some of the parameters are updated."""

    names: list[str]
    parameters: list[Tensor]
    """In the order in which `update` takes gradients."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next update depends on, except parameters and step, as `<kind>.<parameter>`."""

    def update(self, gradients: list[Tensor], rate: Tensor, step: Tensor) -> None:
        """Update parameters and state in place. rate: learning rate (0-d). step: number of this update, from 1 (0-d int32)."""


class Optimizer:
    """All rules of a run.

    Attributes:
        names, parameters: the parameters and their names, in the order in which `update` takes gradients.
        step: 0-d int32 device tensor, number of updates so far.
        average: the mean of the weights over the last part of the run. None means that there is none.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        schedule: Callable[[Tensor], Tensor],
        place: Place = zeros,
        average_from: int | None = None,
    ) -> None:
        """schedule: 0-d step → 0-d learning rate. average_from: updates before those of which `average` is the mean."""
        self.rules = list(rules)
        self.schedule = schedule
        self.names = [name for rule in rules for name in rule.names]
        self.parameters = [parameter for rule in rules for parameter in rule.parameters]
        self.step = place("step", torch.Size(()), self.parameters[0])
        self.average: WeightAverage | None = None
        if average_from is not None:
            self.average = WeightAverage(self.names, self.parameters, average_from, place)

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next update depends on, except the parameters."""
        tensors = {"step": self.step}
        for rule in self.rules:
            tensors |= rule.state
        return tensors | (self.average.state if self.average is not None else {})

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], skip: Tensor | None = None) -> Tensor:
        """One update of the parameters in place; returns the learning rate used (0-d float32).

        Args:
            gradients: in the order of `parameters`, already reduced over replicas and clipped.
            skip: 0-d bool tensor; if true, nothing changes, not even the step, whatever the gradients are. A compiler makes
                one pass of the update and the choice; without one, each rule's tensors are copied before its update.
        """
        rate = self.schedule(self.step)
        begin = 0
        for rule in self.rules:
            end = begin + len(rule.parameters)
            tensors = [] if skip is None else [*rule.parameters, *rule.state.values()]
            before = [tensor.clone() for tensor in tensors]
            rule.update(list(gradients[begin:end]), rate, self.step + 1)
            for tensor, old in zip(tensors, before, strict=True):
                assert skip is not None
                tensor.copy_(torch.where(skip, old, tensor))
            begin = end
        self.step.add_(1 if skip is None else (~skip).to(torch.int32))
        if self.average is not None:
            self.average.update(self.step, skip)
        return rate


def make_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimConfig,
    schedule: Callable[[Tensor], Tensor],
    place: Place = zeros,
    map_matrices: MapMatrices = map_stacks,
    dtype: torch.dtype = torch.bfloat16,
    d_model: int | None = None,
) -> Optimizer:
    """The optimizer that a config describes, over parameters that are grouped by the table in `parameters.py`.

    Args:
        named_parameters: all of a model's, already on their devices.
        config: rules, rates, betas, decays.
        schedule: 0-d step → 0-d learning rate.
        place: makes each tensor of the state.
        map_matrices: runs Muon's orthogonalization.
        dtype: of its products.
        d_model: the model's width, for `base_d_model`. None means that the learning rates hold as they are.
    """
    grouped = [(group_of(name), name, parameter) for name, parameter in named_parameters]
    rules: list[Rule] = []
    if config.optim_type == "muon":
        matrices = [(name, parameter) for group, name, parameter in grouped if group == "matrix"]
        own = group_settings("matrix", config, d_model)
        rules += [Muon(matrices, config, own, place, map_matrices, dtype)] if matrices else []
        grouped = [item for item in grouped if item[0] != "matrix"]
    # Groups that differ in weight decay alone are one rule, so that each foreach operation covers more; scalars come last.
    members: dict[tuple[float, tuple[float, float]], list[tuple[str, Tensor, float]]] = {}
    for group, name, parameter in sorted(grouped, key=lambda item: item[0] == "scalar"):
        own = group_settings(group, config, d_model)
        members.setdefault((own.rate_factor, own.betas), []).append((name, parameter, own.weight_decay))
    rules += [AdamW(group, config, rate, betas, place) for (rate, betas), group in members.items()]
    return Optimizer(rules, schedule, place, config.average_from)
