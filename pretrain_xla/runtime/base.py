"""The protocol of a runtime.

Two classes implement it: `xla.XlaRuntime` (TPU and CPU; SPMD, or one process a device) and `torch_runtime.TorchRuntime` (CUDA
and CPU; alone or DDP). Model, optimizer, data and trainer are written against this protocol and never ask which one they have.
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
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.runtime.shards import Read, Shard

Forward = Callable[..., Tensor]
"""A model as the step calls it, with the arguments of `GPT.forward`."""

Loss = Callable[[Forward, Tensor], Tensor]
"""(model, micro-batch [rows, T + 1]) → mean loss of the micro-batch (0-d, fp32)."""


@dataclass(frozen=True)
class GraphEvent:
    """Something that should not happen after warm-up.

    kind: `recompilation`, `host fallback` or `host transfer`. where: source line, as `file:line in function`. what: what
    happened there, in a clause.
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
    """A module that runs repeatedly on the devices without returning to the host in between."""

    def __call__(
        self, iterations: Tensor, carried: Sequence[Tensor], slices: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run `module(carried, this iteration's slices, fixed) -> (carried, results, going)`.

        Args:
            iterations: maximum number, int32, 0-d; an iteration that returns `going` as false is the last.
            carried: values passed from one iteration to the next, updated in place. The module returns them with the same
                shapes and types; it may update them in place, too.
            slices: iteration i sees element i of each.
            fixed: values that every iteration sees.

        Returns:
            Each result of the module stacked over the iterations; elements beyond the last one are meaningless.
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
    """bf16 peak of one device in flop/s. None means that it is unknown."""
    attention: str
    """For display: what computes attention over full sequences, and why, if that is not a kernel."""
    warnings: Sequence[str]
    """Notes on the devices for the user, one line each; `start` prints them."""
    compute_dtype: torch.dtype
    hosts: Hosts
    """The processes of the run, and how they agree."""
    process_index: int
    process_count: int
    host_count: int
    """Hosts of the whole run."""
    is_main: bool
    """Whether this process writes the files and prints."""
    mesh: dict[str, int]
    """Axis name → devices along it."""
    static_shapes: bool
    """Whether a new shape costs a compilation, so that lengths should be padded to a few."""

    def rows(self, batch_size: int) -> np.ndarray:
        """Indices of the rows of a global batch that this process reads, in the order that `place_batch` expects.

        Raises:
            UserError: `batch_size` does not divide over the devices that split the batch.
        """

    def prepare_model(self, model: GPT, execution: Execution) -> GPT:
        """The version of a model for this runtime, on its devices, sharded by the table; do not use `model` afterwards.

        Args:
            model: built, with its values; or with parameters on the meta device, whose values `load_shards` must then load
                before they are used.
            execution: what is recomputed in the backward pass, and what is run as one loop.
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
        """Compile a part of the step if the step is not compiled as a whole; otherwise returns the function itself."""

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
            loss: mean loss of one micro-batch; it is called with the model on the tensors to differentiate by.
            forward: result of `forward`.
            parameters: all parameters of the model, by name: what to differentiate by.
            tokens_BAS: `[rows, micro-batches, T + 1]` of this process.
            scale: factor on the loss before differentiation (fp16). None means 1.

        Returns:
            The unscaled loss of this process's rows (0-d, fp32), and the gradient of each parameter; None if it has none.
        """

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a 0-d tensor over replicas, on the device."""

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the batch, on every process; call it within a compiled function."""

    def map_matrices(self, function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A function of each of many matrices, the work split over the devices; see `optim.MapMatrices`."""

    def seed(self, seed: int) -> None:
        """Set the state of the device's random numbers; replicas draw different ones."""

    def fetch(self, value: Tensor) -> Future[Tensor]:
        """A host copy of a tensor, later, without stopping the device."""

    def own_shards(self, tensors: Mapping[str, Tensor]) -> list[Shard]:
        """Host copies of this process's share of global tensors, complete when this returns.

        Every process calls it. Together the shards of all processes are the whole tensors, each element once. The copies are
        valid until the next call, which may reuse their memory.
        """

    def load_shards(self, tensors: Mapping[str, Tensor], read: Read) -> None:
        """Give global tensors new values, in place: each process reads the regions that its devices hold, one tensor at a time.

        Every process calls it, but they need not wait for each other. If `read` raises, some tensors have their new values.
        """

    def watch(self) -> AbstractContextManager[Any]:
        """While it is open, host transfers made by this thread are recorded with their source line."""

    def planned(self) -> AbstractContextManager[Any]:
        """While it is open, transfers and compilations are intended and not recorded."""

    def take_events(self) -> list[GraphEvent]:
        """Events recorded since the last call."""

    def graph_counts(self) -> GraphCounts:
        """Compilations so far."""

    def memory_bytes(self) -> int:
        """Memory in use on this process's first device (of the process itself on a CPU). 0: it does not say."""

    def wait(self) -> None:
        """Wait until the devices have finished all their work."""

    def close(self) -> None:
        """Leave together with the other processes, and release the devices and the process group."""
