"""Measurements through PyTorch/XLA, on all devices of the run at once: one program, each device with data of its own.

Each result is compared with what it must be, on every device: a chip that computes wrongly is worse than a slow one. Inputs are
made on the devices, so nothing large is sent, and no host sees another's data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

from pretrain_xla.runtime.bench_sizes import COLLECTIVES, ROUNDS, Sizes, sizes_for
from pretrain_xla.runtime.sharding import BATCH, Axis
from pretrain_xla.runtime.xla.device_memory import tpu_memory
from pretrain_xla.runtime.xla.local_shards import constrain_sharding
from pretrain_xla.runtime.xla.scan import xla_barrier


class XlaBench:
    """The devices that `runtime.start` has opened under SPMD, and the programs that measure them.

    Results are plain values by name, in seconds, bytes and operations.
    """

    def __init__(self) -> None:
        self.device = torch_xla.device()
        self.count = xr.global_runtime_device_count()
        self.kind: str = xr.device_type() or "CPU"
        self.sizes: Sizes = sizes_for(self.kind)
        self.mesh = self._mesh(np.arange(self.count))

    def devices(self) -> dict[str, Any]:
        """What there is."""
        memory = tpu_memory() if self.kind == "TPU" else None
        return {
            "kind": self.kind,
            "count": self.count,
            "local": xr.addressable_runtime_device_count(),
            "processes": xr.process_count(),
            "hbm_used": [one.used for one in memory or ()],
            "hbm_total": [one.total for one in memory or ()],
        }

    def matmul(self) -> dict[str, Any]:
        """Products of square matrices; each device multiplies its own rows."""
        side, products = self.sizes.side, self.sizes.products
        dtype = torch.float32 if self.kind == "CPU" else torch.bfloat16
        # Hadamard's matrix over its length is its own inverse: after an even number of products the input is back, dense sums
        # and all, and nothing grows or vanishes on the way.
        hadamard = self._mark(self._hadamard(side).to(dtype) / side**0.5, (None, None))
        rows = self._mark(self._numbers(self.count, side, side).to(dtype), (BATCH, None, None))
        self._finish()

        def run() -> Tensor:
            found = rows
            for _ in range(products):
                found = found @ hadamard
            return self._mark(found, (BATCH, None, None))

        error = self._errors(run().float() - rows.float())
        seconds = self._seconds(run)
        flops = 2.0 * side**3 * products
        return {
            "side": side,
            "dtype": str(dtype).removeprefix("torch."),
            "flops": flops,
            "seconds": seconds,
            "rate": flops / seconds,
            "errors": error,
        }

    def stream(self) -> dict[str, Any]:
        """Passes over memory: 2 x + 1, written elsewhere."""
        length, passes = self.sizes.stream_bytes // 4, self.sizes.passes
        numbers = self._mark(self._numbers(self.count, 1, length)[:, 0], (BATCH, None))
        self._finish()

        def run() -> Tensor:
            found = numbers
            for _ in range(passes):
                (found,) = xla_barrier([2 * found + 1])  # without it, the passes would be one
            return self._mark(found, (BATCH, None))

        error = self._errors(run() - (numbers * 2**passes + (2**passes - 1)))
        seconds = self._seconds(run)
        moved = 2.0 * passes * 4 * length
        return {"bytes": moved, "passes": passes, "seconds": seconds, "rate": moved / seconds, "errors": error}

    def collective(self, kind: str) -> dict[str, Any]:
        """One kind of collective among all devices, as the partitioner makes it from the sharding of a result.

        Of a reduce-scatter, libtpu 0.0.21 makes an all-reduce and a slice, also where it is asked for by its name; the others
        are what they are called.
        """
        assert kind in COLLECTIVES
        size = self.sizes.collective_bytes
        share = size // self.count if kind == "all-gather" else size
        length = max(share // 4 // (128 * self.count), 1) * 128 * self.count
        numbers = self._mark(self._numbers(self.count, 1, length)[:, 0], (BATCH, None))
        self._finish()
        turned = self._mesh(np.roll(np.arange(self.count), 1))  # the same shards, each on its neighbour

        def run() -> Tensor:
            if kind == "all-reduce":
                return self._mark(numbers.sum(0), (None,))
            if kind == "reduce-scatter":
                return self._mark(numbers.sum(0), (BATCH,))
            axes: tuple[Axis, ...] = {"all-gather": (None, None), "all-to-all": (None, BATCH)}.get(kind, (BATCH, None))
            return self._mark(numbers * 1, axes, turned if kind == "collective-permute" else self.mesh)

        found = run()
        self._finish()
        expected = self._numbers(self.count, 1, length)[:, 0]
        summed = kind in ("all-reduce", "reduce-scatter")
        error = float((found - (expected.sum(0) if summed else expected)).abs().max().cpu())
        del found, expected
        seconds = self._seconds(run)
        side = self.count * length * 4 if kind == "all-gather" else length * 4
        return {"devices": self.count, "bytes": side, "seconds": seconds, "errors": [error]}

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host tensors `[devices, ., .]` on the devices, a row on each."""
        spec = xs.ShardingSpec(self.mesh, (BATCH, None, None))
        placed: Any = xm.send_cpu_data_to_device([*tensors], self.device, input_sharding=spec)
        return list(placed)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host copies in fp32 of all rows of tensors `[devices, ., .]`, on every host."""
        whole = [constrain_sharding(tensor.float(), (None, None, None), self.mesh) for tensor in tensors]
        torch_xla.sync()
        return [tensor.cpu() for tensor in whole]

    def _numbers(self, *shape: int) -> Tensor:
        """Small whole numbers [device, row, column], which differ by device and are exact in bf16, also as sums."""
        device, row, column = (torch.arange(length, device=self.device, dtype=torch.int32) for length in shape)
        return ((device[:, None, None] * 3 + row[None, :, None] * 5 + column[None, None]) % 7 - 3).float()

    def _hadamard(self, side: int) -> Tensor:
        """The matrix of 1 and -1 whose element (i, j) has the sign of the number of ones in i & j."""
        bits = torch.arange(side, device=self.device, dtype=torch.int32)
        common = bits[:, None] & bits[None]
        for shift in (16, 8, 4, 2, 1):
            common = common ^ (common >> shift)
        return 1.0 - 2.0 * (common & 1)

    def _errors(self, difference: Tensor) -> list[float]:
        """The largest difference on each device."""
        largest = difference.abs().flatten(1).amax(1)
        return [float(value) for value in self._mark(largest * 1, (None,)).cpu()]

    def _seconds(self, run: Callable[[], Tensor]) -> float:
        """The shortest mean time of one run, after one that is not counted."""
        fastest = float("inf")
        kept = run()
        self._finish()
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(self.sizes.repeats):
                kept = run()
                torch_xla.sync()
            xm.wait_device_ops()
            fastest = min(fastest, (time.perf_counter() - began) / self.sizes.repeats)
        del kept
        return fastest

    def _finish(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()

    def _mesh(self, order: Any) -> xs.Mesh:
        return xs.Mesh(order, (self.count, 1, 1), ("data", "fsdp", "tensor"))

    def _mark(self, tensor: Tensor, axes: tuple[Axis, ...], mesh: xs.Mesh | None = None) -> Tensor:
        torch_xla._XLAC._xla_mark_sharding(tensor, (mesh or self.mesh).get_op_sharding(axes))
        return tensor
