"""Loops and kernels inside a traced graph, through the XLA compiler on a CPU; in a subprocess, as in `tests/model`."""

import importlib.util
import os
from pathlib import Path

import pytest

from .. import forks

PREAMBLE = """
import os, torch, torch_xla
import numpy as np
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from pretrain_xla.model.xla.context import python_scan
DEVICES = int(os.environ["CPU_NUM_DEVICES"])
if DEVICES > 1:
    xr.use_spmd()
from pretrain_xla.runtime.xla.scan import XlaScan, xla_barrier
xla_scan = XlaScan()
device = torch_xla.device()
generator = torch.Generator().manual_seed(0)
def noise(*shape): return torch.randn(*shape, generator=generator)
"""

LOOPS = """
x_IJ, weights_NJJ, bias_J = noise(3, 4), noise(5, 4, 4), noise(4)

def outer(loop, x_IJ, weights_NJJ, bias_J):
    def body(carried, slices):
        leaf_IJ = carried[0].detach().requires_grad_()
        with torch.enable_grad():
            value = (torch.tanh(leaf_IJ @ slices[0] + bias_J) - torch.tanh(leaf_IJ @ slices[1])).sum()  # bias_J is captured
        (gradient_IJ,) = torch.autograd.grad(value, leaf_IJ)
        def inner(carried, slices):
            return [carried[0] * 0.5 + slices[0].sum()], [slices[0] * 2]
        (total,), (doubled_IJ,) = loop(inner, [carried[1]], [gradient_IJ])
        return [carried[0] + gradient_IJ, total], [doubled_IJ, value.detach() + slices[2].sum()]
    start = [x_IJ, torch.zeros((), device=x_IJ.device)]
    carried, results = loop(body, start, [weights_NJJ], [0.5 * weights_NJJ], [weights_NJJ.square()])
    return [*carried, *results]

expected = outer(python_scan, x_IJ, weights_NJJ, bias_J)
compiled = []
for _ in range(3):
    found = outer(xla_scan, *(tensor.to(device) for tensor in (x_IJ, weights_NJJ, bias_J)))
    torch_xla.sync()
    compiled.append(met.counter_value("UncachedCompile"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)
assert compiled[1] == compiled[2], compiled  # traced again, it is the same graph

ones_J, drop = torch.ones(64, device=device), lambda x: torch.nn.functional.dropout(x, 0.5)
body = lambda carried, slices: (carried, [drop(ones_J * slices[0])])
def outer(carried, slices):
    first_J = drop(ones_J)
    _, (inner_NJ,) = xla_scan(body, carried, [slices[0] + torch.zeros(3, 1, device=device)])
    return carried, [torch.cat([first_J[None], inner_NJ, drop(ones_J)[None]])]

def draw(seed):
    xm.set_rng_state(seed, str(device))
    _, (masks_NJ,) = xla_scan(body, [ones_J], [torch.ones(3, 1).to(device)])
    _, (nested_MNJ,) = xla_scan(outer, [ones_J], [torch.ones(2, 1).to(device)])
    rows_RJ = torch.ones(4, 64).to(device)
    if DEVICES > 1:
        xs.mark_sharding(rows_RJ, xs.Mesh(np.arange(DEVICES), (DEVICES,), ("rows",)), ("rows", None))
    return torch.cat([masks_NJ, nested_MNJ.flatten(0, 1), drop(rows_RJ)]).cpu()

masks_NJ, other_NJ = draw(7), draw(8)
zeros_N = (masks_NJ == 0).sum(1)
assert 12 < zeros_N.min() and zeros_N.max() < 52, f"half of each mask is zero: {zeros_N}"
distinct_NJ = torch.cat([masks_NJ, other_NJ]).unique(dim=0)
assert len(distinct_NJ) == 2 * (3 + 2 * 5 + 4), "each iteration, also of nested loops, and each row on a mesh has its own mask"
assert torch.equal(draw(7), masks_NJ)

numbers_N = torch.arange(4.0)
echo = lambda carried, slices: (carried, [torch.stack(slices)])
for loop, x_N in ((python_scan, numbers_N), (xla_scan, numbers_N.to(device))):
    _, (seen_N3,) = loop(echo, [x_N.sum()], [x_N], [x_N], [x_N])
    assert seen_N3.tolist() == [[0, 3, 2], [1, 2, 1], [2, 1, 0], [3, 0, 3]], (loop, seen_N3)
    _, (seen_N3,) = loop(echo, [x_N.sum()], [x_N[:1]], [x_N[:1]], [x_N[:1]])
    assert seen_N3.tolist() == [[0, 0, 0]], (loop, seen_N3)

first, second = xla_barrier([noise(2).to(device), noise(3).to(device)])
assert first.shape == (2,) and second.shape == (3,)
"""

KERNEL = """
from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.model.xla import XlaContext, layer_scan, optimize_for_xla
from pretrain_xla.model.documents import number_documents
from pretrain_xla.runtime.xla import kernels as xla_kernels
from pretrain_xla.runtime.xla.kernels import FlashAttention

SIZES = dict(vocab_size=61, vocab_multiple=16, seq_length=128, d_model=128, num_layers=2, num_heads=2, d_ff=64)
GPT2 = dict(head_dim=64)
MODERN = dict(norm="rmsnorm_zero_centered", positions="rotary", bias=False, qk_norm=True, num_kv_heads=1, head_dim=128,
              attention_softcap=3.0)
tokens_BT = torch.randint(0, 61, (4, 128), generator=generator, dtype=torch.int32)
mesh = xs.Mesh(np.arange(4), (2, 2, 1), ("data", "fsdp", "tensor"))
SCANNED = Execution("selective", scan_layers=True)
layer_scan.LARGE = 0  # as for weights that do not fit on the chip
for options, execution, documents in ((GPT2, Execution(), False), (MODERN, SCANNED, True)):
    results = []
    for kernel in (None, FlashAttention("v5e", mesh, interpret=True)):
        model = GPT(ModelConfig(**SIZES, **options))
        initialize(model, 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model = optimize_for_xla(model, execution, XlaContext(XlaScan(), xla_barrier, kernel=kernel)).to(device)
        ids_BT = tokens_BT.to(device)
        xs.mark_sharding(ids_BT, mesh, (("data", "fsdp"), None))
        segments_BT = number_documents(ids_BT, 3) if documents else None
        loss = model(ids_BT, ids_BT.roll(-1, 1), segments_BT)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        torch_xla.sync()
        results.append([loss.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for (name, _), one, other in zip([("loss", None), *model.named_parameters()], *results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
assert len(xla_kernels._computations) == 4, "each kernel ran, forward and backward"
"""

ACCUMULATION = """
import statistics
from pretrain_xla.config import build_config
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.runtime import start

SIZES = dict(vocab_size=61, vocab_multiple=16, seq_length=12, d_model=16, num_layers=1, num_heads=2, d_ff=16, dropout=0.5)

def spread(micro_batches):
    train = {"train_batch_size": 4, "gradient_accum_step": micro_batches}
    config = build_config({"model": SIZES, "train": train}, "test")
    runtime = start(config)
    model = GPT(config.model)
    initialize(model, 0)
    for parameter in model.parameters():
        parameter.data.mul_(10)
    model = runtime.prepare_model(model, Execution())
    forward, parameters = runtime.forward(model), dict(model.named_parameters())
    row_S = torch.randint(0, 61, (13,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    batch = runtime.place_batch(row_S.expand(4, micro_batches, 13).contiguous().numpy())
    loss = lambda forward, tokens_BS: forward(tokens_BS[:, :-1], tokens_BS[:, 1:])
    step = runtime.compile(lambda tokens: runtime.gradients(loss, forward, parameters, tokens)[0] * 1, "step", state=tuple)
    losses = []
    for seed in range(100):
        runtime.seed(seed)
        losses.append(runtime.fetch(step(batch)))
    return statistics.stdev(loss.result().item() for loss in losses)

ratio = spread(1) / spread(8)
assert 2.2 < ratio < 3.6, f"over seeds, 8 micro-batches have 1 / sqrt(8) of the loss's spread, not 1 / {ratio:.2f}"

runtime = start(build_config({"model": SIZES, "train": {"train_batch_size": 4}}, "test"))
assert runtime.memory_bytes() > 10_000_000
os.environ["TPU_RUNTIME_METRICS_PORTS"], xr.device_type = "1", lambda: "TPU"  # torch_xla knows no memory under SPMD
assert runtime.memory_bytes() == runtime.memory_bytes() == 0, "a TPU that does not tell its memory ends no run"
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
@pytest.mark.parametrize(
    ("script", "devices"),
    [(LOOPS, 1), (LOOPS, 4), (KERNEL, 4), (ACCUMULATION, 4)],
    ids=["loops", "loops under SPMD", "kernel on a mesh", "dropout of micro-batches"],
)
def test_on_xla(script: str, devices: int) -> None:
    root = Path(__file__).parents[2]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"PJRT_DEVICE": "CPU", "PYTHONPATH": str(root), "XLA_FLAGS": quick}
    run = forks.run(["-c", PREAMBLE + script], environment | {"CPU_NUM_DEVICES": str(devices)})
    assert run.returncode == 0, run.stderr[-3000:]
