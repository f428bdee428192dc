"""Our AdamW next to PyTorch's and torch_xla's on XLA: `PJRT_DEVICE=CPU python benchmarks/optimizers.py`, half a minute.

Each optimizer updates the same parameters, those of 12 GPT-2 blocks at a small width, with a learning rate that changes at
every step. One line for each: milliseconds in which the host traces an update, graphs compiled over all steps, and state
tensors. Tracing does not depend on the width; device time is not measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch import Tensor, nn
from torch_xla.amp.syncfree import AdamW as SyncfreeAdamW

from pretrain_xla.config import OptimConfig
from pretrain_xla.optim import make_optimizer

LAYERS, WIDTH, STEPS, WARM = 12, 64, 30, 5


def parameters(device: torch.device) -> list[nn.Parameter]:
    """Weights and biases of the blocks: 12 tensors in each, with their gradients."""
    D, F = WIDTH, 4 * WIDTH
    shapes = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (F, D), (F,), (D, F), (D,)]
    made = [nn.Parameter(torch.randn(shape, device=device)) for _ in range(LAYERS) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    torch_xla.sync()
    return made


def _rate(step: Tensor) -> Tensor:
    return 1e-3 / (step + 1.0)


def ours(device: torch.device) -> tuple[Callable[[int], object], Callable[[], int]]:
    """Our AdamW. Its schedule is part of the graph."""
    weights = parameters(device)
    names = [f"blocks.{index}.{'weight' if weight.dim() > 1 else 'bias'}" for index, weight in enumerate(weights)]
    optimizer = make_optimizer(zip(names, weights, strict=True), OptimConfig(weight_decay=0.1), _rate)
    gradients: list[Tensor] = [weight.grad for weight in optimizer.parameters if weight.grad is not None]
    return lambda _step: optimizer.update(gradients), lambda: len(optimizer.state)


def of_torch(kind: str, device: torch.device) -> tuple[Callable[[int], object], Callable[[], int]]:
    """A `torch.optim` optimizer: `torch` with defaults, `capturable` with step and rate on the device, or `syncfree`."""
    weights = parameters(device)
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    rate = torch.tensor(1e-3, device=device)
    optimizer: torch.optim.AdamW
    if kind == "syncfree":
        optimizer = SyncfreeAdamW(groups, lr=1e-3)
    elif kind == "capturable":
        optimizer = torch.optim.AdamW(groups, lr=rate, capturable=True, foreach=False)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
    found_inf = torch.zeros((), device=device)

    def update(step: int) -> None:
        if kind == "capturable":
            rate.copy_(1e-3 / torch.tensor(step + 1.0, device=device))
        else:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
        if kind == "syncfree":
            optimizer.step(found_inf=found_inf)  # type: ignore[call-arg]
        else:
            optimizer.step()

    return update, lambda: sum(
        isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values()
    )


def measure(update: Callable[[int], object]) -> tuple[float, int]:
    """Median milliseconds of tracing an update, and graphs compiled over all of them."""
    met.clear_all()
    times = []
    for step in range(STEPS):
        began = time.perf_counter()
        update(step)
        times.append(time.perf_counter() - began)
        torch_xla.sync(wait=True)
    compiled = met.metric_data("CompileTime")
    return 1e3 * statistics.median(times[WARM:]), 0 if compiled is None else compiled[0]


def main() -> None:
    """Print a line for each optimizer."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = torch_xla.device()
    made = {"ours": ours(device)} | {kind: of_torch(kind, device) for kind in ("torch", "capturable", "syncfree")}
    for name, (update, tensors) in made.items():
        milliseconds, graphs = measure(update)
        print(
            f"{name:>10}: {milliseconds:6.2f} ms of tracing, {graphs:2} graphs in {STEPS} steps, {tensors()} state tensors"
        )


if __name__ == "__main__":
    main()
