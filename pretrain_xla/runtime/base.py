"""What the trainer asks of a runtime.

Two classes answer: `xla.XlaRuntime` (TPU and CPU; SPMD, or one process a device) and `torch_runtime.TorchRuntime` (CUDA and
CPU; alone or DDP). Model, optimizer, data and trainer are written against this protocol and never ask which one they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_xla.model import GPT, Execution

Forward = Callable[..., Tensor]
"""A model as the step calls it, with the arguments of `GPT.forward`."""

Loss = Callable[[Forward, Tensor], Tensor]
"""(model, micro-batch [rows, T + 1]) → mean loss of the micro-batch (0-d, fp32)."""


@dataclass(frozen=True)
class GraphEvent:
    """Something that should not happen after warm-up.

    kind: `recompilation`, `host fallback` or `host transfer`. where: source line, as `file:line in function`. what: one
    clause on what happened there.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.what}"


@dataclass
class GraphCounts:
    """What the compiler has done so far. graphs: name of a compiled function → graphs built for it, or read from a cache."""

    graphs: dict[str, int] = field(default_factory=dict)
    compile_seconds: float = 0.0


class Repeat(Protocol):
    """A module that runs again and again on the devices without coming back to the host in between."""

    def __call__(
        self, iterations: Tensor, carried: Sequence[Tensor], slices: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run `module(carried, this iteration's slices, fixed) -> (carried, results, going)`.

        Args:
            iterations: how many at most, int32, 0-d; one that returns `going` as false is the last.
            carried: what goes from one iteration to the next, changed in place. The module returns it with the same shapes and
                types; it may have changed it in place as well.
            slices: iteration i sees element i of each.
            fixed: what every iteration sees.

        Returns:
            Each result of the module stacked over the iterations; what lies beyond the last one means nothing.
        """


class Runtime(Protocol):
    """Devices, processes and compiler, as one process sees them."""

    name: str
    device: torch.device
    device_name: str
    """For display: `CPU`, `TPU v5e`, `NVIDIA A100 …`."""
    device_count: int
    """Devices of the whole run."""
    peak_flops: float | None
    """bf16 peak of one device in flop/s, where it is known."""
    attention: str
    """For display: what computes attention over full sequences, and where it is not a kernel, why."""
    warnings: Sequence[str]
    """What the user should know of the devices, a line each; `start` prints them."""
    compute_dtype: torch.dtype
    process_index: int
    process_count: int
    host_count: int
    """Hosts of the whole run."""
    is_main: bool
    """Whether this process writes the files and prints."""
    mesh: dict[str, int]
    """Axis name → devices along it."""
    static_shapes: bool
    """Whether a new shape costs a compilation, so that lengths are better padded to a few."""

    def rows(self, batch_size: int) -> np.ndarray:
        """Numbers of the rows of a global batch that this process reads, in the order in which `place_batch` takes them.

        Raises:
            UserError: `batch_size` does not divide over the devices that split the batch.
        """

    def prepare_model(self, model: GPT, execution: Execution) -> GPT:
        """The version of a model that runs here, on the devices, sharded by the table; do not use `model` afterwards.

        Args:
            model: built, with its values.
            execution: what is computed again in the backward pass, and what in one loop.
        """

    def forward(self, model: GPT) -> Any:
        """A prepared model as the step calls it (compiled, wrapped for gradient reduction …): a `Forward`."""

    def place_like(self, host: Tensor, parameter: Tensor | None) -> Tensor:
        """A host tensor on the devices, sharded like `parameter` if it has its shape, else replicated."""

    def place_batch(self, tokens: np.ndarray) -> Tensor:
        """This process's rows `[rows, micro-batches, T + 1]`, int32, on the devices. Called from the prefetch thread."""

    def compile(self, function: Callable[..., Tensor], name: str, state: Callable[[], Iterable[Tensor]]) -> Any:
        """`function` as one compiled graph. It may change the `state` tensors in place; it must not read from the device."""

    def repeat(self, module: nn.Module) -> Repeat:
        """A module as a loop, traced once for each set of shapes; call it within a compiled function."""

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a part of the step where the step is not compiled as one; else the function itself."""

    def gradients(
        self,
        loss: Loss,
        forward: Any,
        parameters: Mapping[str, Tensor],
        tokens_BAS: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Mean loss over the micro-batches, and its gradients, reduced once over all replicas.

        Args:
            loss: mean loss of one micro-batch; it is passed the model on the tensors that it is to be differentiated by.
            forward: what `forward` gave.
            parameters: all parameters of the model, by name: what to differentiate by.
            tokens_BAS: `[rows, micro-batches, T + 1]` of this process.
            scale: factor on the loss before differentiation (fp16). None means 1.

        Returns:
            The unscaled loss of this process's rows (0-d, fp32), and each parameter's gradient, or None where none reached it.
        """

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a 0-d tensor over replicas, on the device."""

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of every process, in the order of the batch, for each process to read; called in a compiled function."""

    def seed(self, seed: int) -> None:
        """Set the state of the device's random numbers; replicas draw different ones."""

    def fetch(self, value: Tensor) -> Future[Tensor]:
        """A host copy of a tensor, later, without stopping the device."""

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of global tensors. Every process calls it; those that are not main may get an empty dict."""

    def watch(self) -> AbstractContextManager[Any]:
        """While it is open, host transfers made by this thread are recorded with their source line."""

    def planned(self) -> AbstractContextManager[Any]:
        """While it is open, transfers and compilations are meant and not recorded."""

    def take_events(self) -> list[GraphEvent]:
        """What was recorded since the last call."""

    def graph_counts(self) -> GraphCounts:
        """Compilations so far."""

    def memory_bytes(self) -> int:
        """Memory in use on this process's first device (of the process itself on a CPU)."""

    def wait(self) -> None:
        """Until the devices have done all that was asked of them."""

    def barrier(self) -> None:
        """Until every process is here."""

    def close(self) -> None:
        """Let go of the devices and of the process group."""
