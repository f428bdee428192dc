"""TPU (and CPU) through PyTorch/XLA: SPMD over a mesh, or one replica a device in PJRT multiprocessing.

Under SPMD one process per host sees one virtual device; parameters and batches have the shardings of `sharding.py`, and the
compiler inserts the collectives. With multiprocessing each device has its own process (or thread), which computes on its own
rows and averages gradients explicitly. Both trace the whole step lazily and compile it as one graph.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.kernels.flash_limits import WITHOUT_KERNELS, why_plain
from pretrain_xla.model import GPT, Execution
from pretrain_xla.model.xla import XlaContext, XlaGPT, optimize_for_xla
from pretrain_xla.model.xla.attention import AttentionKernel
from pretrain_xla.model.xla.context import ONE_DEVICE
from pretrain_xla.optim.matrices import map_shares, map_stacks
from pretrain_xla.runtime.base import GraphCounts, GraphEvent, Loss
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.runtime.peak_flops import tpu_peak
from pretrain_xla.runtime.rendezvous import join
from pretrain_xla.runtime.rows import device_numbers, rows_of
from pretrain_xla.runtime.sharding import ACTIVATIONS, BATCH, check_model_fits, lookup, parameter_axes, resolve_mesh
from pretrain_xla.runtime.shards import Read, Shard
from pretrain_xla.runtime.tpu_chip import find_chip
from pretrain_xla.runtime.xla import graphs as xla_graphs
from pretrain_xla.runtime.xla.compiled import CompiledFunction
from pretrain_xla.runtime.xla.device_memory import tpu_memory
from pretrain_xla.runtime.xla.environment import no_such_device, prepare_environment
from pretrain_xla.runtime.xla.gradients import TracedModel, accumulate
from pretrain_xla.runtime.xla.local_shards import MeshLayout, constrain_output, global_tensor, local_shard
from pretrain_xla.runtime.xla.matrices import map_on_mesh
from pretrain_xla.runtime.xla.meeting import check_processes, find_meeting
from pretrain_xla.runtime.xla.own_shards import copy_own_shards, load_own_shards, place_or_reserve
from pretrain_xla.runtime.xla.scan import XlaScan, xla_barrier
from pretrain_xla.runtime.xla.while_loop import RepeatedModule


class XlaRuntime:
    """One process of the xla runtime; see `base.Runtime` for what each member means."""

    name = "xla"

    def __init__(self, config: RunConfig, hosts: Hosts | None = None) -> None:
        prepare_environment(config.parallel)
        self.hosts = join(find_meeting(config.parallel), config.parallel.host_timeout) if hosts is None else hosts
        self.static_shapes = True
        parallel = config.parallel
        self.is_spmd = not parallel.is_multiprocess
        if self.is_spmd and not xr.is_spmd():
            # Before any use of a device, or torch_xla crashes.
            xr.use_spmd()
        try:
            self.device = torch_xla.device()
            xr.global_runtime_device_count()  # under SPMD the device is virtual: only this opens the real devices
        except RuntimeError as error:
            raise no_such_device(error) from None
        precision = {"highest": "highest", "high": "high", "medium": "default"}[config.train.matmul_precision]
        # It warns of a second call even on the first.
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
        torch_xla.backends.set_mat_mul_precision(precision)
        kind = xr.device_type() or "CPU"
        # A virtual device has no kind.
        found = find_chip(None if self.is_spmd else xm.xla_device_kind(self.device)) if kind == "TPU" else None
        self.device_name = f"{kind} (XLA)" if found is None else found.name
        self._chip = found.chip if found else None
        self.peak_flops = tpu_peak(self._chip) if self._chip else None
        self.warnings: Sequence[str] = found.warnings if found else ()
        self.compute_dtype = torch.bfloat16 if config.train.mixed_precision == "bf16" else torch.float32
        if self.is_spmd:
            self.process_index, self.process_count = self.hosts.index, self.hosts.count
            self.device_count = xr.global_runtime_device_count()
            sizes = (parallel.mesh_data, parallel.mesh_fsdp, parallel.mesh_tensor)
            data, fsdp, tensor = resolve_mesh(sizes, self.device_count)
            check_model_fits(config.model, tensor)
        else:
            if parallel.mesh_fsdp > 1 or parallel.mesh_tensor > 1:
                raise UserError(
                    f"mesh_fsdp={parallel.mesh_fsdp} and mesh_tensor={parallel.mesh_tensor} need SPMD: "
                    "leave out --mp-start-method"
                )
            self.process_index, self.process_count = xr.global_ordinal(), xr.world_size()
            self.device_count = self.process_count
            data, fsdp, tensor = self.process_count, 1, 1
        check_processes(self.hosts, xr.process_count() if self.is_spmd else self.process_count)
        self.hosts.devices_are_open()
        self.is_main = self.hosts.is_first
        self.host_count = self.hosts.machines
        if parallel.compile_cache is not None and kind == "TPU":
            xr.initialize_cache(os.path.join(parallel.compile_cache, f"process_{self.process_index}"), readonly=False)
        self.mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        self._mesh: xs.Mesh | None = None
        if self.is_spmd:
            # With one device, too: an unmarked tensor would get its mark from the first graph, and the second would differ.
            self._mesh = xs.Mesh(np.arange(self.device_count), (data, fsdp, tensor), tuple(self.mesh))
        # One of several processes: its number as data on the device, by which it finds its share.
        alone = self.is_spmd or self.process_count == 1
        self._process_index = None if alone else self._send(torch.tensor([self.process_index]))
        # Only if there are several devices to shard a batch over.
        self._spread = self._mesh if self.device_count > 1 else None
        self._scan, self._local_scan = XlaScan(), XlaScan(self._mesh)
        # Dropout draws one mask for the whole batch, which is impossible with local shards.
        self._replicates = self.is_spmd and self.device_count == data > 1 and config.model.dropout == 0
        plain = why_plain(config.model, self._chip, tensor)
        self.attention = f"plain: {plain}" if plain else f"the kernel for {self._chip}"
        self._uses_kernels = config.model.attention != "reference"
        # A host can feed only its own rows if its devices hold whole rows, that is, without a tensor axis.
        self._feeds_own_rows = not self.is_spmd or tensor == 1
        # In the order in which torch_xla distributes what this process feeds.
        self._devices = device_numbers(torch_xla.real_devices()) if self.is_spmd else [self.process_index]
        self._strict = config.train.strict_graph
        self._counts = GraphCounts()
        self._events: list[GraphEvent] = []
        self._transfers = xla_graphs.HostTransferWatch(self._events.append)
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._tells_memory = True

    def rows(self, batch_size: int) -> np.ndarray:
        """See `base.Runtime.rows`."""
        shards = self.mesh["data"] * self.mesh["fsdp"]
        if batch_size % shards:
            raise UserError(
                f"a batch of {batch_size} sequences does not divide over data x fsdp = {shards} devices: "
                "change --train-batch-size / --eval-batch-size, or the mesh"
            )
        if not self._feeds_own_rows:
            return np.arange(batch_size)
        return rows_of(self._devices, self.device_count, batch_size)

    def prepare_model(self, model: GPT, execution: Execution) -> XlaGPT:
        """See `base.Runtime.prepare_model`.

        Raises:
            UserError: jax, which lowers the kernels, is not installed.
        """
        prepared = optimize_for_xla(model, execution, self._context(local=False))
        self.place_model(prepared)
        self._constrain_activations(prepared)
        return prepared

    def place_model(self, model: nn.Module) -> None:
        """Move parameters and buffers to the devices, in place, sharded by the table."""
        is_empty = any(parameter.is_meta for parameter in model.parameters())
        model._apply(lambda tensor: place_or_reserve(tensor, self.device))
        if not self.is_spmd and self.process_count > 1 and not is_empty:
            xm.broadcast_master_param(model)  # threads of one process share torch's RNG, so replicas may differ
        if self._mesh is not None:
            for name, parameter in model.named_parameters():
                xs.mark_sharding(parameter, self._mesh, parameter_axes(name))
        if not is_empty:  # else there is nothing to be sent, and a program would be compiled to fill them
            torch_xla.sync()

    def forward(self, model: nn.Module) -> TracedModel:
        """See `base.Runtime.forward`."""
        if not (self._replicates and isinstance(model, XlaGPT)):
            return TracedModel(model)
        with torch.device("meta"):
            plain = GPT(model.config, model.compute_dtype)
            return TracedModel(model, optimize_for_xla(plain, model.execution, self._context(local=True)))

    def _context(self, *, local: bool) -> XlaContext:
        """The context in which a model is traced: over the global batch, or over one device's local shard of it."""
        if local:
            return XlaContext(self._local_scan, xla_barrier, ONE_DEVICE, self._kernel(None))
        layout = ONE_DEVICE if self._spread is None else MeshLayout(self._spread)
        return XlaContext(self._scan, xla_barrier, layout, self._kernel(self._spread))

    def _kernel(self, mesh: xs.Mesh | None) -> AttentionKernel | None:
        """Attention's TPU kernel, on a generation that has one, unless the config asks for plain attention.

        mesh: the mesh over which its inputs are sharded. None means they are one device's.
        """
        if self._chip is None or self._chip in WITHOUT_KERNELS or not self._uses_kernels:
            return None
        try:
            from pretrain_xla.runtime.xla.kernels import FlashAttention
        except ModuleNotFoundError as error:
            raise UserError(
                f"the TPU's attention kernels need {error.name}: pip install -r requirements-xla_tpu.txt, "
                "or choose --attention reference"
            ) from None
        return FlashAttention(self._chip, mesh)

    def _constrain_activations(self, model: nn.Module) -> None:
        """Under SPMD, constrain the sharding of the outputs of the modules in the sharding table, and of their gradients."""
        if self._mesh is None:
            return
        for name, module in model.named_modules():
            axes = lookup(ACTIVATIONS, name)
            if axes is not None:
                module.register_forward_hook(constrain_output(self._mesh, axes))

    def place_like(self, host: Tensor, parameter: Tensor | None) -> Tensor:
        """See `base.Runtime.place_like`."""
        # Not `host.to(device)`: a 0-d 0, 1 or -1 would become a constant of the first graph that uses it, and not an input.
        placed = self._send(host)
        if self._mesh is not None and parameter is not None and host.shape == parameter.shape:
            sharding = torch_xla._XLAC._get_xla_op_sharding(parameter)
            if sharding is not None:
                torch_xla._XLAC._xla_mark_sharding(placed, sharding)
        return placed

    def place_batch(self, tokens: np.ndarray) -> Tensor:
        """See `base.Runtime.place_batch`."""
        host = torch.from_numpy(tokens)
        if self._mesh is None:
            return host.to(self.device)
        spec = xs.ShardingSpec(self._mesh, (BATCH, None, None), minibatch=self._feeds_own_rows)
        return self._send(host, spec)

    def _send(self, host: Tensor, spec: xs.ShardingSpec | None = None) -> Tensor:
        sent: Any = xm.send_cpu_data_to_device([host], self.device, input_sharding=spec)
        return sent[0]

    def compile(
        self, function: Callable[..., Tensor], name: str, state: Callable[[], Iterable[Tensor]]
    ) -> Callable[..., Tensor]:
        """See `base.Runtime.compile`. The function is traced at each call; its graph is compiled at the first."""
        warn = self._warn if self._spread is not None else None
        return CompiledFunction(
            function, name, state, self._counts, self._events.append, explain=self._strict, warn=warn
        )

    def _warn(self, text: str) -> None:
        if self.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def repeat(self, module: nn.Module) -> RepeatedModule:
        """See `base.Runtime.repeat`."""
        return RepeatedModule(module)

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself, since the whole step is one graph."""
        return function

    def gradients(
        self,
        loss: Loss,
        forward: TracedModel,
        parameters: Mapping[str, Tensor],
        tokens_BAS: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """See `base.Runtime.gradients`; several micro-batches are one loop of the program, under SPMD the compiler reduces."""
        if self._replicates:
            return self._gradients_of_replicas(loss, forward, parameters, tokens_BAS, scale)
        names, values = list(parameters), list(parameters.values())

        def forward_on(given: list[Tensor]) -> Callable[..., Tensor]:
            return forward.on(dict(zip(names, given, strict=True)))

        total, gradients = accumulate(loss, forward_on, values, len(values), tokens_BAS, scale, self._scan)
        if not self.is_spmd and self.process_count > 1:
            xm.all_reduce(xm.REDUCE_SUM, [g for g in gradients if g is not None], scale=1.0 / self.process_count)
        return total, gradients

    def _gradients_of_replicas(
        self,
        loss: Loss,
        forward: TracedModel,
        parameters: Mapping[str, Tensor],
        tokens_BAS: Tensor,
        scale: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Under SPMD with replicated weights: each device computes the gradients of its own rows, and they are reduced once.

        The partitioner alone reduces a gradient wherever it arises: twice for tied embeddings, and in every micro-batch unless
        it finds that the sum can wait.
        """
        assert self._mesh is not None
        mesh, buffers = self._mesh, dict(forward.model.named_buffers())
        placed = dict(parameters) | buffers

        def forward_on(given: list[Tensor]) -> Callable[..., Tensor]:
            return forward.on(dict(zip(placed, given, strict=True)), local=True)

        values = [local_shard(tensor.detach(), (None,) * tensor.dim(), mesh) for tensor in placed.values()]
        rows = local_shard(tokens_BAS, (BATCH, None, None), mesh)
        total, gradients = accumulate(loss, forward_on, values, len(parameters), rows, scale, self._local_scan)

        def mean(own: Tensor) -> Tensor:
            return global_tensor(own[None], (BATCH, *(None,) * own.dim()), mesh).mean(0)

        return mean(total), [None if gradient is None else mean(gradient) for gradient in gradients]

    def mean(self, value: Tensor) -> Tensor:
        """See `base.Runtime.mean`."""
        if self.is_spmd or self.process_count == 1:
            return value
        reduced: Any = xm.all_reduce(xm.REDUCE_SUM, value, scale=1.0 / self.process_count)
        return reduced

    def all_rows(self, rows: Tensor) -> Tensor:
        """See `base.Runtime.all_rows`. Under SPMD the rows are global already, but may be on another host's devices."""
        if self._mesh is not None:
            return xs.mark_sharding_with_gradients(rows, self._mesh, (None,) * rows.dim())
        gathered: Tensor = xm.all_gather(rows) if self.process_count > 1 else rows
        return gathered

    def map_matrices(self, function: Callable[[Tensor], Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `base.Runtime.map_matrices`."""
        if self._spread is not None:
            return map_on_mesh(function, matrices, self._spread)
        if self._process_index is not None:
            return map_shares(function, matrices, self._process_index, self.process_count, self.all_rows)
        return map_stacks(function, matrices)

    def seed(self, seed: int) -> None:
        """See `base.Runtime.seed`. The seed is an input of the graph, so a new seed does not recompile."""
        offset = 0 if self.is_spmd else self.process_index * 0x9E3779B9
        xm.set_rng_state((seed + offset) % 2**63, str(self.device))

    def fetch(self, value: Tensor) -> Future[Tensor]:
        """See `base.Runtime.fetch`; a thread waits for the value while this one traces the next steps."""
        return self._fetcher.submit(lambda: value.detach().cpu())

    def own_shards(self, tensors: Mapping[str, Tensor]) -> list[Shard]:
        """See `base.Runtime.own_shards`."""
        with self.planned():
            return copy_own_shards(tensors, self.process_index, self.process_count)

    def load_shards(self, tensors: Mapping[str, Tensor], read: Read) -> None:
        """See `base.Runtime.load_shards`."""
        with self.planned():
            load_own_shards(tensors, read, self.place_like, torch_xla.real_devices() if self.is_spmd else [])
            torch_xla.sync()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """See `base.Runtime.watch`."""
        with self._transfers:
            yield

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """See `base.Runtime.planned`."""
        self._transfers.paused += 1
        try:
            yield
        finally:
            self._transfers.paused -= 1

    def take_events(self) -> list[GraphEvent]:
        """See `base.Runtime.take_events`."""
        events = list(self._events)
        self._events.clear()
        return events

    def graph_counts(self) -> GraphCounts:
        """See `base.Runtime.graph_counts`; `other` are graphs outside any compiled function (placing, gathering)."""
        graphs = dict(self._counts.graphs)
        graphs["other"] = xla_graphs.compilations() - sum(graphs.values())
        return GraphCounts(graphs, xla_graphs.compile_seconds())

    def memory_bytes(self) -> int:
        """See `base.Runtime.memory_bytes`."""
        if xr.device_type() == "CPU":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not self.is_spmd:
            return int(xm.get_memory_info(self.device)["bytes_used"])
        found = tpu_memory() if self._tells_memory else None
        self._tells_memory = found is not None  # ask no server a second time that does not answer
        return found[0].used if found else 0

    def wait(self) -> None:
        """See `base.Runtime.wait`."""
        xm.wait_device_ops()

    def close(self) -> None:
        """See `base.Runtime.close`."""
        self._fetcher.shutdown(wait=True)
        self.hosts.close()
