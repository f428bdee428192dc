"""Losses and gradients that go bad on the device, for batches that hold a certain token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_xla.model.documents import Examples

_plain = Examples.loss


def bad_loss(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """The loss of a micro-batch with the token is NaN, and so is every gradient."""

    def loss(self: Examples, forward: Any, tokens_BS: Tensor) -> Tensor:
        return _plain(self, forward, tokens_BS) * _marked(tokens_BS, token, torch.nan)

    monkeypatch.setattr(Examples, "loss", loss)


def bad_gradient(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """The loss stays as it is, and the gradient of `head.weight` is NaN."""

    def loss(self: Examples, forward: Any, tokens_BS: Tensor) -> Tensor:
        good = 1.0 - _marked(tokens_BS, token, 1.0, 0.0)
        weight = forward.get_parameter("head.weight")
        # The root of 0 has an infinite slope, and 0 times that is NaN.
        return _plain(self, forward, tokens_BS) + 0.0 * (weight.square().sum() * good).sqrt()

    monkeypatch.setattr(Examples, "loss", loss)


def _marked(tokens_BS: Tensor, token: int, yes: float, no: float = 1.0) -> Tensor:
    """`yes` if the token is there, else `no`, on the device."""
    return torch.where((tokens_BS == token).any(), yes, no)
