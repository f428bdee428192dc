"""The trainer's own step, traced to HLO without weights in memory.

`AbstractRuntime` is the xla runtime with one difference: instead of copying a tensor to the devices, it creates a placeholder
of its shape and type, and records which input it is. Model, optimizer and `TrainStep` are the trainer's own. A
step of 1.5B parameters over 256 devices is traced in a second.

The process must be started with `PJRT_DEVICE=CPU` and `CPU_NUM_DEVICES` set to the number of devices of the mesh: torch_xla
reads both once, when it first uses a device.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor, nn

from pretrain_xla.config import RunConfig
from pretrain_xla.model import GPT
from pretrain_xla.run_folder.build import build_examples, build_optimizer, execution_of
from pretrain_xla.runtime.sharding import BATCH, Axis, parameter_axes, ways
from pretrain_xla.runtime.xla.runtime import XlaRuntime
from pretrain_xla.train.step import METRICS, TrainStep


@dataclasses.dataclass(frozen=True)
class Argument:
    """One input of the step. kind: `parameter`, `optimizer`, `batch` or `other`. axes: mesh axes of each dimension."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[Axis, ...]

    def device_bytes(self, mesh: dict[str, int]) -> int:
        """Bytes of one device's shard."""
        size = self.dtype.itemsize
        for length, axis in zip(self.shape, self.axes, strict=True):
            size *= -(-length // ways(axis, mesh))
        return size


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step before compilation.

    hlo: serialised HloModuleProto for the whole batch, before partitioning. arguments: input number → input; missing ones are
    scalars. results: for each output the argument that it replaces (donated), or None, and its axes.
    """

    hlo: bytes
    arguments: dict[int, Argument]
    results: tuple[tuple[int | None, tuple[Axis, ...]], ...]
    mesh: dict[str, int]


class AbstractRuntime(XlaRuntime):
    """The xla runtime with placeholders for data."""

    def __init__(self, config: RunConfig, chip: str) -> None:
        super().__init__(config)
        self._chip = chip  # the kernels of this generation are traced, although the host has no such device
        self.placed: list[tuple[Argument, Tensor]] = []

    def placeholder(self, name: str, kind: str, shape: Iterable[int], dtype: torch.dtype, axes: Any) -> Tensor:
        """A tensor on the device without data."""
        argument = Argument(name, kind, tuple(shape), dtype, tuple(axes))
        tensor = xb.create_placeholder_tensor(argument.shape, dtype)
        self.placed.append((argument, tensor))
        # The step gets a clone, which is the same value in the graph: an in-place update would change this handle, too.
        return tensor.clone()

    def place_model(self, model: nn.Module) -> None:
        """Placeholders for parameters and buffers."""
        for name, parameter in model.named_parameters():
            owner, leaf = _owner(model, name)
            tensor = self.placeholder(name, "parameter", parameter.shape, parameter.dtype, parameter_axes(name))
            owner.register_parameter(leaf, nn.Parameter(tensor))
        for name, buffer in model.named_buffers():
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = self.placeholder(name, "other", buffer.shape, buffer.dtype, (None,) * buffer.dim())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def trace_step(config: RunConfig, chip: str) -> TracedStep:
    """Trace one training step of a run, as its trainer would on a generation of TPUs (`v5e`).

    Raises:
        UserError: the batch or the model is not divisible by the mesh.
    """
    with _many_devices():
        return _trace(config, chip)


@contextmanager
def _many_devices() -> Iterator[None]:
    """Report more devices to torch_xla than PyTorch's autograd, which counts them in 8 bits, could handle."""
    count = int(os.environ.get("CPU_NUM_DEVICES", "1"))
    if count <= 127:
        yield
        return
    os.environ["CPU_NUM_DEVICES"] = "1"
    with mock.patch("torch_xla.runtime.global_runtime_device_count", return_value=count):
        yield


def _trace(config: RunConfig, chip: str) -> TracedStep:
    runtime = AbstractRuntime(config, chip)
    runtime.rows(config.train.train_batch_size)  # refuses a batch that is not divisible
    with torch.device("meta"):
        plain = GPT(config.model, runtime.compute_dtype)
        model = runtime.prepare_model(plain, execution_of(config))

    def place(name: str, shape: torch.Size, like: Tensor) -> Tensor:
        dtype = torch.int32 if name == "step" else torch.float32
        axes = parameter_axes(name.partition(".")[2]) if shape == like.shape else (None,) * len(shape)
        return runtime.placeholder(name, "optimizer", shape, dtype, axes)

    optimizer = build_optimizer(config, model, place, runtime.map_matrices)
    step = TrainStep(model, optimizer, runtime, config, build_examples(config, None))
    for tensors in (step.guard.state, step.guard.diagnosis):
        for name, tensor in tensors.items():
            axes = (None,) * tensor.dim()
            tensors[name] = runtime.placeholder(f"guard.{name}", "other", tensor.shape, tensor.dtype, axes)
    batch = (config.train.train_batch_size, config.train.gradient_accum_step, config.model.seq_length + 1)
    tokens = runtime.placeholder("tokens", "batch", batch, torch.int32, (BATCH, None, None))
    history = (config.logging.log_interval, len(METRICS))
    new_history = step(tokens, runtime.placeholder("metrics", "other", history, torch.float32, (None, None)))

    guard = {**step.guard.state, **step.guard.diagnosis}
    state = [*model.named_parameters(), *optimizer.state.items(), *((f"guard.{name}", guard[name]) for name in guard)]
    context = torch_xla._XLAC.lowering.LoweringContext("train_step")
    context.build([new_history, *(tensor for _, tensor in state)])
    arguments = {context.tensor_parameter_id(tensor): argument for argument, tensor in runtime.placed}
    arguments.pop(-1, None)
    number = {argument.name: index for index, argument in arguments.items()}
    results: list[tuple[int | None, tuple[Axis, ...]]] = [(number["metrics"], (None, None))]
    results += [(number[name], arguments[number[name]].axes) for name, _ in state]
    return TracedStep(context.hlo(), arguments, tuple(results), runtime.mesh)
