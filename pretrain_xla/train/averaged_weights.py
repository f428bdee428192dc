"""The mean of the weights in place of the weights, while something is measured or generated with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pretrain_xla.optim import Optimizer
from pretrain_xla.runtime import Runtime


class AveragedWeights:
    """Exchanges weights and means on the devices: within the models that use them, and without a third copy of all.

    Args:
        optimizer: of the run; without an average, the weights stay as they are.
        runtime: compiles the exchange.
    """

    def __init__(self, optimizer: Optimizer, runtime: Runtime) -> None:
        self._average = average = optimizer.average
        if average is None:
            return

        def exchange() -> Tensor:
            average.exchange()
            return optimizer.step + 1  # a compiled function returns a tensor

        self._exchange = runtime.compile(exchange, "exchange", state=lambda: [*average.parameters, *average.means])

    @contextmanager
    def __call__(self, done: int) -> Iterator[None]:
        """While it is open, the model has the mean of its weights. done: updates so far. Every process must call it."""
        if self._average is None or done <= self._average.start:  # until then they are equal
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
