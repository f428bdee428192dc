"""What a rematerialised block keeps from its forward pass, marked where it is computed.

A block that is rematerialised runs twice: once forward, once more inside backward, to have autograd's graph again. Values
passed through `remember` are kept by the first run and put in place by the second, so that what computed them (matrix
products, attention) is not computed again; what lies between them (norms, activations, casts) is, and costs next to
nothing: XLA fuses it into the products that read it. Outside of these two runs `remember` does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Run(threading.local):
    """The run under way in this thread (autograd has threads of its own): where values go, or where they come from."""

    kept: list[Tensor] | None = None
    replayed: list[Tensor] | None = None


_run = _Run()


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """A first run: gives the list into which remembered values go."""
    values: list[Tensor] = []
    with _during(values, None):
        yield values


@contextmanager
def replaying(values: Sequence[Tensor]) -> Iterator[None]:
    """A second run: remembered values are those of the first, in the same order."""
    with _during(None, list(values)):
        yield


@contextmanager
def _during(kept: list[Tensor] | None, replayed: list[Tensor] | None) -> Iterator[None]:
    before = _run.kept, _run.replayed
    _run.kept, _run.replayed = kept, replayed
    try:
        yield
    finally:
        _run.kept, _run.replayed = before


def remember(value: Tensor) -> Tensor:
    """The value; in a second run the kept one, with the gradient going where it would have gone."""
    if _run.kept is not None:
        _run.kept.append(value.detach())
    if _run.replayed is not None:
        replaced: Tensor = _Replace.apply(value, _run.replayed.pop(0))
        return replaced
    return value


def remembered(compute: Callable[[], Sequence[Tensor]], count: int) -> list[Tensor]:
    """The `count` values of `compute()`, which a second run does not call.

    For the forward of an `autograd.Function`, whose values have no gradient history.
    """
    if _run.replayed is not None:
        return [_run.replayed.pop(0) for _ in range(count)]
    values = list(compute())
    assert len(values) == count
    if _run.kept is not None:
        _run.kept.extend(values)
    return values


class _Replace(torch.autograd.Function):
    """Forward: the kept value. Backward: the gradient of the computed one."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
