"""What a checkpoint costs: `python benchmarks/checkpoint.py`, about three minutes; 124M parameters with AdamW, 1.5 GB of state.

A loop makes steps (a fixed piece of matrix work) while the state is saved, as the trainer does it: a copy to the host's memory,
then a thread that writes. It prints

* stall: how long the loop waits for an asynchronous save, and for a blocking one, which ends when the checkpoint is complete;
* slower steps: the time that the loop's steps lose while the bytes go out, as a share of the blocking save, too;
* memory: peak of the process over what it had before, against the size of the state;
* bytes: all files of the checkpoint, against the size of the state;
* resume: time to read and check it all, and the model alone.

Then 2 and 4 processes that hold the same state write a checkpoint together: bytes and memory of each. Last, two processes read
it at the same time, into tensors that are there already: memory of each over these, as a share of the state, if it reads

* all of the state before it goes to the devices, as every host did before;
* tensor by tensor, all of it, as DDP's processes do;
* tensor by tensor, its half of each, as the hosts of a mesh over fsdp do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Threads that wait sleep: spinning, they would take the time of other programs, and count as ours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain_xla.config import build_config  # noqa: E402
from pretrain_xla.model import GPT  # noqa: E402
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore  # noqa: E402
from pretrain_xla.run_folder.state_source import read_regions  # noqa: E402
from pretrain_xla.runtime.shards import unstack_shards  # noqa: E402
from pretrain_xla.runtime.torch_runtime import TorchRuntime  # noqa: E402

GPT2 = {"vocab_size": 50257, "d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072, "tie_weights": True}


def make_state(layers: int) -> dict[str, Tensor]:
    """Parameters and both moments of AdamW, random."""
    config = build_config({"model": GPT2 | {"num_layers": layers}}, "the benchmark")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(config.model).named_parameters()}
    kinds = ("model.", "optimizer.first_moment.", "optimizer.second_moment.")
    return {kind + name: torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


def size_of(state: dict[str, Tensor]) -> int:
    """Bytes of a state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


class PeakMemory:
    """The largest resident memory of this process while it is open, in bytes over what it had before."""

    def __enter__(self) -> PeakMemory:
        self._before = self._now()
        self.bytes, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.005):
            self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Loop:
    """A training loop's steps: each a fixed piece of work of about a tenth of a second."""

    def __init__(self) -> None:
        self._a, self._b = torch.randn(768, 768), torch.randn(768, 768)

    def step(self) -> float:
        """Make one; returns its seconds."""
        began = time.perf_counter()
        for _ in range(20):
            torch.mm(self._a, self._b)
        return time.perf_counter() - began


def write_alone(layers: int, folder: Path, rounds: int) -> None:
    """Measure one process, and print it."""
    state, loop = make_state(layers), Loop()
    runtime = TorchRuntime(
        build_config({"model": GPT2, "parallel": {"runtime": "torch", "device": "cpu"}}, "benchmark")
    )
    store, size = CheckpointStore(str(folder / "c"), limit=1), size_of(state)
    print(f"state: {size / 1e9:.2f} GB in {len(state)} tensors")
    shares, computed_shares, lost_shares, blockings = [], [], [], []
    began = time.perf_counter()
    with PeakMemory() as memory:
        store.save(list(unstack_shards(runtime.own_shards(state))), info(1))
        first = time.perf_counter() - began
        store.wait()
    print(f"  first stall {first:.2f} s: the system gives the memory, which is kept for later saves")
    for number in range(2, 2 * rounds + 2, 2):
        quiet = statistics.median(loop.step() for _ in range(20))
        began, computed = time.perf_counter(), time.process_time()
        store.save(list(unstack_shards(runtime.own_shards(state))), info(number))
        stall, stall_computed, steps = time.perf_counter() - began, time.process_time() - computed, list[float]()
        while store._background.busy:
            steps.append(loop.step())
        store.wait()
        began, computed = time.perf_counter(), time.process_time()
        store.save(list(unstack_shards(runtime.own_shards(state))), info(number + 1))
        store.wait()
        blocking = time.perf_counter() - began
        computed_shares.append(stall_computed / (time.process_time() - computed))
        lost = max(sum(steps) - quiet * len(steps), 0.0)
        blockings.append(blocking)
        shares.append(stall / blocking)
        lost_shares.append(lost / blocking)
        longest = max(steps, default=0.0)
        print(
            f"  stall {stall:.2f} s, blocking save {blocking:.2f} s, longest step {longest:.2f} s, usual {quiet:.2f} s"
        )
    newest = store.newest()
    assert newest is not None
    written = sum(path.stat().st_size for path in Path(store.folder(newest)).iterdir())
    print(f"stall: {statistics.median(shares):.3f} of a blocking save ({statistics.median(blockings):.2f} s)")
    print(f"stall in processor time, which other programs disturb less: {statistics.median(computed_shares):.3f}")
    print(f"slower steps: {statistics.median(lost_shares):.3f} of a blocking save")
    print(f"memory: {memory.bytes / size:.3f} of the state")
    print(f"bytes: {written / size:.4f} of the state")
    for what, prefix in (("all", ""), ("the model", "model.")):
        began = time.perf_counter()
        store.load(newest, prefix)
        print(f"resume: {time.perf_counter() - began:.2f} s for {what}")
    store.close()
    runtime.close()


def info(step: int) -> CheckpointInfo:
    """What the marker says."""
    return CheckpointInfo(step, None, "data", {})


def write_share(index: int, count: int, folder: str, state: dict[str, Tensor], results: Any) -> None:
    """One of several processes: write its share, and report the bytes of its file and its memory."""
    torch.set_num_threads(1)
    runtime = TorchRuntime(
        build_config({"model": GPT2, "parallel": {"runtime": "torch", "device": "cpu"}}, "benchmark")
    )
    runtime.process_index, runtime.process_count = index, count
    store = CheckpointStore(folder, limit=1)
    store.write_with_others(index, count)
    for tensor in state.values():  # so that the shared state counts as this process's before
        tensor.sum()
    with PeakMemory() as memory:
        store.save(list(unstack_shards(runtime.own_shards(state))), info(1))
        store.close()
    written = os.stat(f"{store.folder(1)}/__{index}_0.distcp").st_size
    results.put((index, written, memory.bytes))
    runtime.close()


def write_together(count: int, layers: int, folder: Path) -> None:
    """Measure several processes, and print them."""
    state = {name: tensor.share_memory_() for name, tensor in make_state(layers).items()}
    size, context = size_of(state), multiprocessing.get_context("spawn")
    results = context.Queue()
    root = str(folder / f"of_{count}")
    group = [context.Process(target=write_share, args=(i, count, root, state, results)) for i in range(count)]
    for process in group:
        process.start()
    reports = sorted(results.get() for _ in group)
    for process in group:
        process.join()
    read = CheckpointStore(root, limit=1).load(1)
    assert all(torch.equal(read[name], state[name]) for name in state), "what is read is not what was written"
    shares = ", ".join(f"{written / size:.3f} ({memory / size:.3f})" for _, written, memory in reports)
    print(f"{count} processes, {size / 1e9:.2f} GB: bytes of each against the state (and memory): {shares}")


def read_share(index: int, count: int, folder: str, layers: int, results: Any) -> None:
    """One of several processes: read a checkpoint in each of the three ways, and report the memory."""
    torch.set_num_threads(1)
    runtime = TorchRuntime(
        build_config({"model": GPT2, "parallel": {"runtime": "torch", "device": "cpu"}}, "benchmark")
    )
    state, store = make_state(layers), CheckpointStore(folder, limit=1)
    stored, peaks = store.stored(1), list[int]()

    def load_all() -> None:
        tensors = store.load(1)
        for name, tensor in state.items():
            tensor.copy_(tensors[name])

    def load_own_half() -> None:
        for name, tensor in state.items():
            rows = tensor.shape[0] // count
            region = ((rows * index, *(0,) * (tensor.dim() - 1)), (rows, *tensor.shape[1:]))
            tensor[rows * index : rows * (index + 1)] = read_regions(stored, name, [region])[0]

    for load in (
        load_own_half,
        lambda: runtime.load_shards(state, lambda name, regions: read_regions(stored, name, regions)),
        load_all,
    ):
        with PeakMemory() as memory:
            load()
        peaks.append(memory.bytes)
    results.put((index, peaks))
    runtime.close()


def read_together(count: int, layers: int, folder: Path) -> None:
    """Measure processes that read a checkpoint that as many have written, and print them."""
    size, context = size_of(make_state(layers)), multiprocessing.get_context("spawn")
    results = context.Queue()
    group = [
        context.Process(target=read_share, args=(i, count, str(folder / f"of_{count}"), layers, results))
        for i in range(count)
    ]
    for process in group:
        process.start()
    reports = [peaks for _, peaks in sorted(results.get() for _ in group)]
    for process in group:
        process.join()
    half, tensors, whole = (max(column) / size for column in zip(*reports, strict=True))
    print(
        f"{count} processes read {size / 1e9:.2f} GB: memory of each against the state: {whole:.3f} if all is read first, "
        f"{tensors:.3f} tensor by tensor, {half:.3f} of its own half"
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="12 make 124M parameters")
    parser.add_argument("--together", type=int, default=2, help="layers of the state that several processes write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder is made in it")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        write_alone(flags.layers, Path(folder), flags.rounds)
        for count in (2, 4):
            write_together(count, flags.together, Path(folder))
        read_together(2, flags.together, Path(folder))


if __name__ == "__main__":
    main()
