"""The feed-forward layer, plain (up, nonlinearity, down) or gated (GLU variants, Shazeer 2020)."""

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.layers import Linear
from pretrain_xla.model.remember import remember


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, config.bias)
        self.gate = Linear(config.d_model, config.d_ff, config.bias) if config.gated else None
        self.down = Linear(config.d_ff, config.d_model, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself, in x's type."""
        up_BTF = remember(self.up(x_BTD))
        if self.gate is None:
            return cast(Tensor, self.down(self.activation(up_BTF)))
        return cast(Tensor, self.down(self.activation(remember(self.gate(x_BTD))) * up_BTF))
