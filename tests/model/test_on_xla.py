"""The model through the XLA compiler, in a process of its own: importing torch_xla changes torch for whoever comes after."""

import importlib.util
import os
from pathlib import Path

import pytest

from .. import forks

SCRIPT = """
import torch, torch_xla
import torch_xla.debug.metrics as met
from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.model.xla import optimize_for_xla
from pretrain_xla.model.xla.context import XlaContext
from pretrain_xla.model.xla.linear import ProductBiasLinear
from pretrain_xla.runtime.xla.scan import XlaScan, xla_barrier

SIZES = dict(vocab_size=61, vocab_multiple=16, seq_length=12, d_model=24, num_layers=1, num_heads=4, d_ff=40)
GPT2 = {}
GEMMA = dict(norm="rmsnorm_zero_centered", positions="rotary", gated=True, bias=False, qk_norm=True, num_kv_heads=2,
             tie_weights=True, post_norm=True, attention="reference", attention_softcap=5.0, logit_softcap=3.0)
torch_xla.runtime.use_spmd()  # as the trainer does, also with one device
device = torch_xla.device()
for options in (GPT2, GEMMA):
    model = GPT(ModelConfig(**SIZES, **options))
    initialize(model, 0)
    fast = optimize_for_xla(model, Execution(), XlaContext(XlaScan(), xla_barrier))
    tokens_BT = torch.randint(0, 61, (2, 12), dtype=torch.int32)
    results = []
    for place, model in ((device, fast), ("cpu", model)):
        model.to(place)
        model.zero_grad()
        logits_BTV, loss = model(tokens_BT.to(place)), model(tokens_BT.to(place), tokens_BT.roll(-1, 1).to(place))
        loss.backward()
        text = torch_xla._XLAC._get_xla_tensors_text([loss]) if place == device else ""
        assert "f64" not in text, text
        torch_xla.sync()
        results.append([logits_BTV.detach().cpu(), loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for on_xla, on_cpu in zip(*results, strict=True):
        torch.testing.assert_close(on_xla, on_cpu, atol=1e-5, rtol=1e-5)
compiled, model = [], fast.to(device)
for _ in range(3):
    model.zero_grad()
    model(tokens_BT.to(device), tokens_BT.roll(-1, 1).to(device)).backward()
    torch_xla.sync()
    compiled.append(met.metric_data("CompileTime")[0])
assert compiled[1] == compiled[2], compiled
fallbacks = [name for name in met.counter_names() if name.startswith("aten::")]
assert not fallbacks, fallbacks
linear, x_BTF = ProductBiasLinear(24, 16, bias=True).to(device), torch.randn(2, 40, 24).to(device).bfloat16()
torch.nn.init.ones_(linear.weight), torch.nn.init.zeros_(linear.bias)
output = linear(x_BTF)
assert "AddBias" in str(output.grad_fn)
output.backward(output.detach())
torch.testing.assert_close(linear.bias.grad.cpu(), output.detach().cpu().float().sum((0, 1)).bfloat16().float())
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_same_results_one_graph_and_nothing_on_the_host():
    root = Path(__file__).parents[2]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"PJRT_DEVICE": "CPU", "PYTHONPATH": str(root), "XLA_FLAGS": quick}
    run = forks.run(["-c", SCRIPT], environment)
    assert run.returncode == 0, run.stderr[-3000:]
