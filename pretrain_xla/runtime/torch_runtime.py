"""CUDA and CPU with plain PyTorch: one process alone, or DDP under torchrun. Does not need torch_xla."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain_xla.config import ModelConfig, RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.model import GPT, Execution
from pretrain_xla.model.torch_rewrite import optimize_for_torch
from pretrain_xla.optim.matrices import map_shares, map_stacks
from pretrain_xla.runtime.base import Forward, GraphCounts, GraphEvent, Loss, Repeat
from pretrain_xla.runtime.hosts import Hosts, JoinedHosts
from pretrain_xla.runtime.launched import launched
from pretrain_xla.runtime.peak_flops import gpu_peak
from pretrain_xla.runtime.rendezvous import join, torchrun_meeting
from pretrain_xla.runtime.rows import rows_of
from pretrain_xla.runtime.shards import Read, Rows, Shard, divide_rows, whole_region
from pretrain_xla.runtime.torch_waits import watch_waits

# torch 2.9 warns so about its own defaults.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")

WARM_UP = 3
"""Calls of a function before its waits count: the first compiles, and in the second DDP lays out its buckets."""

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """One process of the torch runtime; see `base.Runtime` for what each member means."""

    name = "torch"

    def __init__(self, config: RunConfig, hosts: Hosts | None = None) -> None:
        parallel = config.parallel
        has_cuda = torch.cuda.is_available()
        kind = ("cuda" if has_cuda else "cpu") if parallel.device == "auto" else parallel.device
        if kind == "cuda" and not has_cuda:
            raise UserError("device=cuda, but PyTorch sees no CUDA device: check the driver, or use --device cpu")
        if config.train.mixed_precision == "fp16" and kind != "cuda":
            raise UserError("mixed_precision=fp16 needs CUDA, and this run is on the CPU: use bf16, or leave it out")
        if parallel.mesh_fsdp > 1 or parallel.mesh_tensor > 1:
            raise UserError(
                f"mesh_fsdp={parallel.mesh_fsdp} and mesh_tensor={parallel.mesh_tensor} need runtime=xla: "
                "the torch runtime replicates the model (DDP); set both to 1"
            )
        self._compiles = config.train.compile
        if self._compiles:
            _check_compiler()
        self.static_shapes = False
        self._replica: DistributedDataParallel | None = None
        self.warnings: Sequence[str] = ()
        self.attention = _attention(config.model)
        one = launched()
        self.process_count, self.process_index, local_rank = one.world_size, one.rank, one.local_rank
        self.host_count = one.hosts
        if kind == "cuda" and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local_rank} on this host, which has {torch.cuda.device_count()} CUDA "
                "device(s): lower --nproc_per_node"
            )
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
        self.distributed = one.distributed
        backend = parallel.ddp_backend or ("nccl" if kind == "cuda" else "gloo")
        if self.distributed and backend == "nccl" and kind != "cuda":
            raise UserError("ddp_backend=nccl needs CUDA: use --ddp-backend gloo on a CPU")
        self.hosts = join(torchrun_meeting(), parallel.host_timeout) if hosts is None else hosts
        if isinstance(self.hosts, JoinedHosts):
            dist.init_process_group(
                backend,
                store=self.hosts.store(),
                rank=self.process_index,
                world_size=self.process_count,
                device_id=self.device if kind == "cuda" else None,
            )
        self.hosts.devices_are_open()
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        # On the device from the start: copied in each step, it would make the host wait.
        self._process_number = torch.tensor([self.process_index], device=self.device)
        if torch.get_float32_matmul_precision() != config.train.matmul_precision:
            torch.set_float32_matmul_precision(config.train.matmul_precision)
        self.is_main = self.hosts.is_first
        self.device_count = self.process_count
        self.device_name = torch.cuda.get_device_name(self.device) if kind == "cuda" else "CPU"
        self.peak_flops = gpu_peak(self.device_name) if kind == "cuda" else None
        self.compute_dtype = DTYPES[config.train.mixed_precision]
        self.mesh = {"data": self.process_count}
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._host_copies: dict[Rows, Tensor] = {}
        self._counts = GraphCounts()
        self._events: list[GraphEvent] = []
        self._warming_up = False

    def rows(self, batch_size: int) -> np.ndarray:
        """See `base.Runtime.rows`."""
        if batch_size % self.process_count:
            raise UserError(
                f"a batch of {batch_size} sequences does not divide over {self.process_count} processes: "
                "change --train-batch-size / --eval-batch-size"
            )
        return rows_of([self.process_index], self.process_count, batch_size)

    def prepare_model(self, model: GPT, execution: Execution) -> GPT:
        """See `base.Runtime.prepare_model`."""
        prepared = optimize_for_torch(model, execution)
        return prepared._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t.to(self.device))

    def forward(self, model: nn.Module) -> Callable[..., Tensor]:
        """See `base.Runtime.forward`; torch.compile inside DDP, so that gradient buckets still overlap the backward."""
        inner: Any = torch.compile(model, dynamic=False) if self._compiles else model
        if not self.distributed:
            return inner
        devices = [self.device.index] if self.device.type == "cuda" else None
        self._replica = DistributedDataParallel(inner, device_ids=devices, broadcast_buffers=False)
        return self._replica

    def place_like(self, host: Tensor, parameter: Tensor | None) -> Tensor:
        """See `base.Runtime.place_like`."""
        return host.to(self.device, copy=True)

    def place_batch(self, tokens: np.ndarray) -> Tensor:
        """See `base.Runtime.place_batch`; from pinned memory on CUDA, so that the copy overlaps the step."""
        host = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host

    def compile(
        self, function: Callable[..., Tensor], name: str, state: Callable[[], Iterable[Tensor]]
    ) -> Callable[..., Tensor]:
        """The function itself: here `forward` and `fuse` compile its parts. Graphs that torch.compile adds are counted."""
        if not self._compiles and self.device.type != "cuda":
            return function
        calls = 0

        def run(*arguments: Tensor) -> Tensor:
            nonlocal calls
            before, start = _graphs_built(), time.perf_counter()
            calls, self._warming_up = calls + 1, calls < WARM_UP
            result = function(*arguments)
            self._warming_up = False
            added = _graphs_built() - before if self._compiles else 0
            if added:
                self._counts.compile_seconds += time.perf_counter() - start
                if calls > 1:
                    what = f"torch.compile built {added} more graph(s); TORCH_LOGS=recompiles says why"
                    self._events.append(GraphEvent("recompilation", name, what))
                self._counts.graphs[name] = self._counts.graphs.get(name, 0) + added
            return result

        return run

    def repeat(self, module: nn.Module) -> Repeat:
        """See `base.Runtime.repeat`; a Python loop, which checks after each iteration whether to continue."""

        @torch.no_grad()
        def run(
            iterations: Tensor, carried: Sequence[Tensor], slices: Sequence[Tensor], fixed: Sequence[Tensor]
        ) -> list[Tensor]:
            stacked: list[list[Tensor]] = []
            for index in range(int(iterations)):
                state, results, going = module(carried, [tensor[index] for tensor in slices], fixed)
                for old, new in zip(carried, state, strict=True):
                    if new is not old:
                        old.copy_(new)
                stacked.append(results)
                if not going:
                    break
            return [torch.stack(column) for column in zip(*stacked, strict=True)]

        return run

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `base.Runtime.fuse`."""
        return torch.compile(function, dynamic=False) if self._compiles else function

    def gradients(
        self,
        loss: Loss,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        tokens_BAS: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """See `base.Runtime.gradients`; DDP reduces during the backward pass of the last micro-batch."""
        count = tokens_BAS.shape[1]
        total = torch.zeros((), device=tokens_BAS.device)
        for index in range(count):
            waits = self._replica is not None and index < count - 1
            with self._replica.no_sync() if waits and self._replica is not None else contextlib.nullcontext():
                value = loss(forward, tokens_BAS[:, index]) / count
                (value if scale is None else value * scale).backward()
            total = total + value.detach()
        gradients = [parameter.grad for parameter in parameters.values()]
        for parameter in parameters.values():
            parameter.grad = None  # the next backward creates new ones, so they take no memory between steps
        return total, gradients

    def mean(self, value: Tensor) -> Tensor:
        """See `base.Runtime.mean`."""
        if not self.distributed:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.process_count

    def all_rows(self, rows: Tensor) -> Tensor:
        """See `base.Runtime.all_rows`."""
        if not self.distributed:
            return rows
        gathered = rows.new_empty((self.process_count * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    def map_matrices(self, function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `base.Runtime.map_matrices`; each process takes a share of every stack, and they gather the results."""
        if not self.distributed:
            return map_stacks(function, matrices)
        return map_shares(function, matrices, self._process_number, self.process_count, self.all_rows)

    def seed(self, seed: int) -> None:
        """See `base.Runtime.seed`."""
        torch.manual_seed((seed + self.process_index * 0x9E3779B9) % 2**63)

    def fetch(self, value: Tensor) -> Future[Tensor]:
        """See `base.Runtime.fetch`; on CUDA a copy to pinned memory, which a thread waits for."""
        if self.device.type != "cuda":
            future: Future[Tensor] = Future()
            future.set_result(value.detach().clone())
            return future
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return self._fetcher.submit(wait)

    def own_shards(self, tensors: Mapping[str, Tensor]) -> list[Shard]:
        """See `base.Runtime.own_shards`; on CUDA through pinned memory, all copies at once.

        The memory is kept for the next call: most of a first copy's time goes into getting it from the system.
        """
        shards = []
        for rows in divide_rows(tensors, self.process_index, self.process_count):
            tensor = tensors[rows.name].detach()
            own, host = rows.of(tensor), self._host_copies.get(rows)
            if host is None:
                host = torch.empty(own.shape, dtype=own.dtype, pin_memory=self.device.type == "cuda")
                self._host_copies[rows] = host
            shards.append(rows.shard(tensor, host.copy_(own, non_blocking=True)))
        with self.planned():
            self.wait()
        return shards

    def load_shards(self, tensors: Mapping[str, Tensor], read: Read) -> None:
        """See `base.Runtime.load_shards`; every replica reads whole tensors."""
        for name, tensor in tensors.items():
            tensor.detach().copy_(read(name, [whole_region(tensor.shape)])[0])

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """See `base.Runtime.watch`; uses PyTorch's check for synchronisations with CUDA. On a CPU there are no transfers."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with watch_waits(self._record_wait):
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _record_wait(self, line: str) -> None:
        if not self._warming_up:
            self._events.append(GraphEvent("host transfer", line, "a call that waits for the device"))

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """See `base.Runtime.planned`."""
        mode = torch.cuda.get_sync_debug_mode() if self.device.type == "cuda" else 0
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)

    def take_events(self) -> list[GraphEvent]:
        """See `base.Runtime.take_events`."""
        events, self._events = self._events, []
        return events

    def graph_counts(self) -> GraphCounts:
        """See `base.Runtime.graph_counts`."""
        return self._counts

    def memory_bytes(self) -> int:
        """See `base.Runtime.memory_bytes`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def wait(self) -> None:
        """See `base.Runtime.wait`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """See `base.Runtime.close`."""
        self._fetcher.shutdown(wait=True)
        self.hosts.close()
        if self.distributed:
            dist.destroy_process_group()


def _attention(model: ModelConfig) -> str:
    """What computes attention here, for display."""
    if model.attention == "reference":
        return "plain: --attention reference"
    if model.attention_softcap is not None:
        return "plain: PyTorch's fused kernels cannot cap scores"
    return "PyTorch's fused kernels"


def _check_compiler() -> None:
    """torch.compile writes C++ for a CPU, and launchers of its kernels for a GPU. Without a compiler the first step fails.

    Raises:
        UserError: there is no compiler.
    """
    compilers = (os.environ.get("CXX") or "g++", os.environ.get("CC") or "gcc", "clang")
    if not any(map(shutil.which, compilers)):
        raise UserError(
            f"compile=True needs a C++ compiler, and none of {', '.join(compilers)} is installed: install g++, name yours in "
            "CXX, or leave out --compile"
        )


def _graphs_built() -> int:
    """Graphs that torch.compile has built in this process, by its own counter."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
