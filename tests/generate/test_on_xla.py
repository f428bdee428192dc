"""The same tokens on XLA as on plain PyTorch, with and without cache, from two graphs; in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from .. import forks

SCRIPT = """
import json, sys
import torch
from pretrain_xla.config import build_config
from pretrain_xla.generate.continuation import Continuation, Request
from pretrain_xla.generate.decoder import Decoder
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.runtime import start

MODEL = dict(vocab_size=97, vocab_multiple=16, seq_length=300, d_model=32, num_layers=2, num_heads=4, d_ff=48, init="normal")
OPTIONS = dict(positions="rotary", norm="rmsnorm_zero_centered", bias=False, qk_norm=True, num_kv_heads=2, gated=True,
               activation="silu", attention_softcap=5.0, logit_softcap=30.0, tie_weights=True, post_norm=True)
parallel = json.loads(sys.argv[1])
tree = {"model": MODEL | (OPTIONS if sys.argv[2] == "modern" else {}), "parallel": parallel}
config = build_config(tree, "test")
runtime = start(config)
model = GPT(config.model)
initialize(model, 1)
for parameter in model.parameters():
    if parameter.dim() == 2:
        parameter.data.mul_(5)
model = runtime.prepare_model(model.eval(), Execution())
decoder = Decoder(model, runtime)
texts = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [90]]

def rows(count, sampling, **changes):
    rows = [[] for _ in texts]
    for row, token in Continuation(decoder, texts, Request(count, sampling, seed=3, **changes)):
        rows[row].append(token)
    return rows

result = {"greedy": rows(256, Sampling(temperature=0))}
result["graphs"] = dict(runtime.graph_counts().graphs)
assert rows(256, Sampling(temperature=0)) == result["greedy"], "again, by the same two graphs"
result["events"] = [str(event) for event in runtime.take_events()]
result["uncached"] = rows(12, Sampling(temperature=0), cached=False)
result["drawn"] = rows(20, Sampling(0.8, 40, 0.95, 0.01, 1.1))
result["cold"] = rows(20, Sampling(1e-40, 40, 0.95, 0.01, 1.1))
print(json.dumps(result))
runtime.close()
"""


def run(parallel: str, kind: str, devices: str = "1") -> str:
    root = Path(__file__).parents[2]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": devices, "XLA_FLAGS": quick}
    done = forks.run(["-c", SCRIPT, parallel, kind], environment | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
@pytest.mark.parametrize(
    ("kind", "parallel", "devices"),
    [
        ("modern", '{"runtime": "xla"}', "1"),
        ("classic", '{"runtime": "xla", "mesh_fsdp": 2, "mesh_tensor": 2}', "4"),
    ],
    ids=["modern on one device", "classic on a mesh"],
)
def test_tokens_and_graphs(kind: str, parallel: str, devices: str) -> None:
    ours = json.loads(run(parallel, kind, devices))
    theirs = json.loads(run('{"runtime": "torch", "device": "cpu"}', kind))
    assert ours["graphs"] == {"prefill": 1, "decode": 1, "other": 0}, "two graphs for 256 tokens"
    assert ours["events"] == []
    assert len({token for row in theirs["greedy"] for token in row}) > 20
    for name in ("greedy", "uncached", "drawn", "cold"):
        assert ours[name] == theirs[name], name
    assert ours["uncached"] == [row[:12] for row in ours["greedy"]]
