"""The same measurements with plain PyTorch, on a GPU or a CPU: of one device, without collectives."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain_xla.doctor.check import Figures
from pretrain_xla.runtime.bench_sizes import ROUNDS, sizes_for


class TorchBench:
    """The device of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = device.type.upper()
        self.sizes = sizes_for(self.kind)

    def devices(self) -> Figures:
        """What there is."""
        free, total = torch.cuda.mem_get_info(self.device) if self.kind == "CUDA" else (0, 0)
        memory = [total - free] if total else []
        return {
            "kind": self.kind,
            "count": 1,
            "local": 1,
            "processes": 1,
            "hbm_used": memory,
            "hbm_total": [total] if total else [],
        }

    def matmul(self) -> Figures:
        """See `XlaBench.matmul`."""
        side, products = self.sizes.side, self.sizes.products
        dtype = torch.float32 if self.kind == "CPU" else torch.bfloat16
        hadamard = torch.ones(1, 1)
        while len(hadamard) < side:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
        hadamard = (hadamard / side**0.5).to(self.device, dtype)
        row, column = (torch.arange(side, device=self.device) for _ in range(2))
        rows = ((row[:, None] * 5 + column) % 7 - 3).to(dtype)

        def run() -> Tensor:
            found = rows
            for _ in range(products):
                found = found @ hadamard
            return found

        error = float((run().float() - rows.float()).abs().max())
        seconds = self._seconds(run)
        flops = 2.0 * side**3 * products
        return {
            "side": side,
            "dtype": str(dtype).removeprefix("torch."),
            "flops": flops,
            "seconds": seconds,
            "rate": flops / seconds,
            "errors": [error],
        }

    def stream(self) -> Figures:
        """See `XlaBench.stream`."""
        passes = self.sizes.passes
        numbers = (torch.arange(self.sizes.stream_bytes // 4, device=self.device) % 7 - 3).float()
        other = torch.empty_like(numbers)

        def run() -> Tensor:
            for _ in range(passes):
                torch.mul(numbers, 2, out=other)
            return other

        error = float((run() - 2 * numbers).abs().max())
        seconds = self._seconds(run)
        moved = 2.0 * passes * 4 * len(numbers)
        return {"bytes": moved, "passes": passes, "seconds": seconds, "rate": moved / seconds, "errors": [error]}

    def _seconds(self, run: Callable[[], Tensor]) -> float:
        fastest = float("inf")
        run()
        for _ in range(ROUNDS):
            self._wait()
            began = time.perf_counter()
            for _ in range(self.sizes.repeats):
                run()
            self._wait()
            fastest = min(fastest, (time.perf_counter() - began) / self.sizes.repeats)
        return fastest

    def _wait(self) -> None:
        if self.kind == "CUDA":
            torch.cuda.synchronize(self.device)
