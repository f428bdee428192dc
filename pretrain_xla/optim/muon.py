"""Muon: momentum whose matrices are orthogonalized, for the matrices of the blocks (Jordan et al. 2024).

An update by gradient has a few large singular values and many small ones; orthogonalized, it moves all directions of a matrix
alike. One moment is stored where AdamW has two. With it come NorMuon's scale for each row (Li et al. 2025,
https://arxiv.org/abs/2510.05491) and cautious weight decay (Chen et al. 2025, https://arxiv.org/abs/2510.12402).

Ours stays next to `torch.optim.Muon`, against which it is tested, because that one has neither of the two nor polynomials by
iteration, takes one matrix after the other, computes the same on every device, and reads its learning rate on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim.matrices import MapMatrices, map_stacks
from pretrain_xla.optim.newton_schulz import QUINTIC, orthogonalize, polar_express
from pretrain_xla.optim.parameters import GroupSettings, Place, scheduled_decay, zeros

FIRST_MOMENTUM = 0.85
"""Where the momentum's warm-up begins."""


class Muon:
    """The rule for matrices.

    Attributes:
        names, parameters: the parameters and their names, in the order in which `update` takes gradients.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        config: OptimConfig,
        settings: GroupSettings,
        place: Place = zeros,
        map_matrices: MapMatrices = map_stacks,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Create the state.

        Args:
            parameters: names and matrices (R, C), or (L, R, C) of L layers.
            config: momentum, polynomials, scale, what the weight decay does.
            settings: of the group: factor on the learning rate, weight decay.
            place: makes each tensor of the state.
            map_matrices: runs the orthogonalization.
            dtype: of its products.
        """
        self.config, self.settings = config, settings
        self.map_matrices, self.dtype = map_matrices, dtype
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.momenta = [place(f"momentum.{name}", parameter.shape, parameter) for name, parameter in parameters]
        self.row_moments: list[Tensor] = []
        if config.muon_row_beta:
            self.row_moments = [place(f"row_moment.{name}", p.shape[:-1], p) for name, p in parameters]
        quintic, iterations = config.muon_polynomials == "quintic", config.muon_iterations
        self.polynomials = (QUINTIC,) * iterations if quintic else polar_express(iterations)

    @property
    def state(self) -> dict[str, Tensor]:
        """`momentum.<parameter>`, and `row_moment.<parameter>` where rows are scaled."""
        tensors = {f"momentum.{name}": value for name, value in zip(self.names, self.momenta, strict=True)}
        if self.row_moments:
            tensors |= {f"row_moment.{name}": value for name, value in zip(self.names, self.row_moments, strict=True)}
        return tensors

    def update(self, gradients: list[Tensor], rate: Tensor, step: Tensor) -> None:
        """See `Rule.update`."""
        directions = self.map_matrices(self._orthogonalize, self._momentum_steps(gradients, step))
        own_rate = rate if self.settings.rate_factor == 1.0 else rate * self.settings.rate_factor
        decay = scheduled_decay(self.settings.weight_decay, rate, self.config) * own_rate
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            direction_RC = directions[name]
            factor = own_rate * self.shape_factor(parameter)
            if self.row_moments:
                factor = factor * self._row_factors(index, direction_RC)[..., None]
            change_RC = direction_RC.float() * factor
            if self.settings.weight_decay:
                shrink_RC = parameter * decay
                if self.config.cautious_weight_decay:
                    shrink_RC = torch.where(direction_RC * parameter > 0, shrink_RC, 0.0)
                change_RC = change_RC + shrink_RC
            parameter.sub_(change_RC)

    def shape_factor(self, parameter: Tensor) -> float:
        """Factor on an orthogonal update: by `muon_scale`, of the matrix' rows and columns."""
        rows, columns = parameter.shape[-2:]
        if self.config.muon_scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

    def _momentum_steps(self, gradients: list[Tensor], step: Tensor) -> dict[str, Tensor]:
        """Update the momenta; each parameter's update before it is orthogonalized (Nesterov's)."""
        momentum: Tensor | float = self.config.muon_momentum
        if self.config.muon_momentum_warmup:
            done = ((step.to(torch.float32) - 1.0) / self.config.muon_momentum_warmup).clamp(max=1.0)
            momentum = FIRST_MOMENTUM + (self.config.muon_momentum - FIRST_MOMENTUM) * done
        fresh = torch._foreach_mul(gradients, 1.0 - momentum)
        torch._foreach_mul_(self.momenta, momentum)
        torch._foreach_add_(self.momenta, fresh)
        ahead = torch._foreach_add(torch._foreach_mul(self.momenta, momentum), fresh)
        # In the type of the products already here, so that half as much is stacked and sent.
        return {name: matrix.to(self.dtype) for name, matrix in zip(self.names, ahead, strict=True)}

    def _orthogonalize(self, matrices_NRC: Tensor) -> Tensor:
        return orthogonalize(matrices_NRC, self.polynomials, self.dtype)

    def _row_factors(self, index: int, direction_RC: Tensor) -> Tensor:
        """NorMuon: a factor for each row, such that rows whose updates were large get smaller ones, at the same norm of all."""
        beta = self.config.muon_row_beta
        squares_R = direction_RC.float().square().mean(-1)
        moment_R = self.row_moments[index]
        moment_R.mul_(beta).add_(squares_R * (1.0 - beta))
        factors_R = 1.0 / (moment_R.sqrt() + 1e-8)
        ratio = squares_R.sum(-1, keepdim=True) / (squares_R * factors_R.square()).sum(-1, keepdim=True).clamp(
            min=1e-30
        )
        return factors_R * ratio.sqrt()
