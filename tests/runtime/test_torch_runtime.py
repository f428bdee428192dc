"""The torch runtime on a CPU: what it refuses, and the contract of `base.Runtime` that the trainer relies on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.runtime import start
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.runtime.torch_waits import watch_waits
from pretrain_xla.train.graph_guard import GraphGuard

Make = Callable[..., TorchRuntime]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds a runtime of one process on the CPU; keywords are config sections with their changes."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    made: list[TorchRuntime] = []

    def build(**tree: dict[str, Any]) -> TorchRuntime:
        tree["parallel"] = {"runtime": "torch", "device": "cpu"} | tree.get("parallel", {})
        made.append(TorchRuntime(build_config(tree, "test")))
        return made[-1]

    yield build
    for runtime in made:
        runtime.close()


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"train": {"mixed_precision": "fp16"}}, "mixed_precision=fp16 needs CUDA"),
        ({"parallel": {"mesh_fsdp": 2}}, "mesh_fsdp=2 and mesh_tensor=1 need runtime=xla"),
        ({"parallel": {"mesh_tensor": 2}}, "mesh_fsdp=1 and mesh_tensor=2 need runtime=xla"),
    ],
)
def test_settings_that_a_cpu_cannot_run_are_refused(tree: dict[str, Any], expected: str, make: Make) -> None:
    with pytest.raises(UserError, match=expected):
        make(**tree)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda(make: Make) -> None:
    with pytest.raises(UserError, match=r"sees no CUDA device: .*--device cpu"):
        make(parallel={"device": "cuda"})
    assert make(parallel={"device": "auto"}).device == torch.device("cpu")


def test_nccl_on_a_cpu_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="ddp_backend=nccl needs CUDA: use --ddp-backend gloo"):
        make(parallel={"ddp_backend": "nccl"})
    assert not dist.is_initialized()


def test_properties(make: Make) -> None:
    runtime = make(train={"mixed_precision": "bf16"})
    assert (runtime.name, runtime.device_name, runtime.device_count) == ("torch", "CPU", 1)
    assert (runtime.process_index, runtime.process_count, runtime.is_main) == (0, 1, True)
    assert runtime.mesh == {"data": 1}
    assert runtime.compute_dtype == torch.bfloat16
    assert make().compute_dtype == torch.float32
    assert runtime.peak_flops is None
    assert 10_000_000 < runtime.memory_bytes() < 2**40
    assert runtime.take_events() == []
    assert isinstance(start(build_config({"parallel": {"runtime": "torch", "device": "cpu"}}, "test")), TorchRuntime)


def test_each_process_reads_its_share_of_the_rows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make().rows(7).tolist() == list(range(7))
    taken = []
    for rank in range(4):
        runtime = make()
        runtime.process_index, runtime.process_count = rank, 4
        taken += runtime.rows(12).tolist()
        with pytest.raises(UserError, match="a batch of 6 sequences does not divide over 4 processes"):
            runtime.rows(6)
    assert taken == list(range(12))


def test_random_numbers_are_a_function_of_seed_and_process(make: Make) -> None:
    runtime = make()

    def draw(seed: int, process: int = 0) -> list[float]:
        runtime.process_index = process
        runtime.seed(seed)
        values: list[float] = torch.rand(4).tolist()
        return values

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(5) != draw(5, process=1)
    assert draw(2**62 + 1) == draw(2**62 + 1)


def test_fetch_place_and_own_shards_copy(make: Make) -> None:
    runtime = make()
    tensor = torch.ones(3)
    later, placed, (own,) = runtime.fetch(tensor), runtime.place_like(tensor, None), runtime.own_shards({"a": tensor})
    tensor.zero_()
    for copy in (later.result(), placed, own.block):
        assert torch.equal(copy, torch.ones(3))
    runtime.process_index, runtime.process_count = 1, 2
    assert runtime.own_shards({"a": tensor}) == [], "so small a tensor is the first process's"


def test_a_batch_is_placed_unchanged(make: Make) -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(4, 2, 3)
    placed = make().place_batch(tokens)
    assert placed.dtype == torch.int32
    assert np.array_equal(placed.numpy(), tokens)


def test_one_process_in_eager_mode_reduces_and_compiles_nothing(make: Make) -> None:
    runtime, model = make(), nn.Linear(2, 2)
    assert runtime.forward(model) is model
    assert runtime.fuse(len) is len
    assert runtime.compile(abs, "x", tuple) is abs
    assert float(runtime.mean(torch.tensor(2.5))) == 2.5
    assert runtime.graph_counts().graphs == {}
    with runtime.watch(), runtime.planned():
        runtime.wait()
        runtime.hosts.barrier("a point")


def test_gradients_are_the_mean_over_micro_batches(make: Make) -> None:
    runtime, weight, unused = make(), nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.ones(1))
    tokens_BAS = torch.tensor([[[1.0], [3.0]]])
    loss = lambda _forward, tokens_BS: (weight * tokens_BS).sum() ** 2  # noqa: E731
    parameters = {"weight": weight, "unused": unused}
    total, gradients = runtime.gradients(loss, None, parameters, tokens_BAS, scale=torch.tensor(10.0))
    assert float(total) == (4 + 36) / 2
    assert gradients[0] is not None
    assert float(gradients[0]) == 10 * (2 * 2 * 1 + 2 * 2 * 9) / 2
    assert gradients[1] is None
    assert weight.grad is None


def test_in_a_process_group(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, text)
    runtime = make()
    try:
        assert dist.get_backend() == "gloo"
        model = nn.Linear(3, 1)
        wrapped = runtime.forward(model)
        x = torch.randn(4, 3)
        loss = lambda forward, x_BI: forward(x_BI).sum()  # noqa: E731
        total, (gradient,) = runtime.gradients(loss, wrapped, {"weight": model.weight}, torch.stack([x, x], 1))
        torch.testing.assert_close(total, 2 * (model(x).sum() / 2).detach())
        assert gradient is not None
        torch.testing.assert_close(gradient[0], x.sum(0))
        assert model.weight.grad is None
        value = torch.tensor(2.5)
        assert float(runtime.mean(value)) == 2.5
        assert float(value) == 2.5
        runtime.hosts.barrier("a point")
    finally:
        runtime.close()
    assert not dist.is_initialized()
    runtime.distributed = False


def test_a_cached_first_graph_does_not_hide_the_next(make: Make) -> None:
    runtime = make(train={"compile": True})
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    double(torch.ones(2))
    run = runtime.compile(double, "train", tuple)
    run(torch.ones(2))
    assert runtime.take_events() == []
    guard = GraphGuard(runtime, strict=True, say=print)
    run(torch.ones(3))
    with pytest.raises(UserError, match=r"step 2: recompilation at train: torch.compile built 1 more graph"):
        guard.check(2)


def test_a_wait_for_the_gpu_ends_a_strict_run_and_names_the_line(make: Make, recwarn: pytest.WarningsRecorder) -> None:
    runtime = make()

    def waits() -> None:  # as PyTorch's C++ does for each call, at the line of the call
        text = (
            "called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:197.)"
        )
        warnings.warn(text, UserWarning, stacklevel=1)

    with watch_waits(runtime._record_wait):
        runtime._warming_up = True
        waits()
        runtime._warming_up = False
        for _ in range(2):
            waits()
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["another"]
    assert len(runtime._events) == 2, "each wait but that of the warm-up"
    guard = GraphGuard(runtime, strict=True, say=print)
    with pytest.raises(
        UserError, match=rf"step 7: host transfer at {re.escape(__file__)}:\d+ in waits: a call that waits"
    ):
        guard.check(7)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = build_config({"train": {"compile": True}, "parallel": {"runtime": "torch", "device": "cpu"}}, "test")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        TorchRuntime(config)
