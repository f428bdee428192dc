"""What the TPU compiler makes of the measured programs: as many products and passes as are counted, and each collective."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pretrain_xla.preflight.client import ENVIRONMENT
from tests import forks
from tests.end_to_end.conftest import environment

SCRIPT = """
import dataclasses, json
from pretrain_xla.config import build_config
from pretrain_xla.runtime import start
start(build_config({}, "doctor"))
import torch_xla
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jaxlib.mlir import ir
from pretrain_xla.runtime.bench_sizes import COLLECTIVES, LARGE
from pretrain_xla.runtime.xla.device_bench import XlaBench
from pretrain_xla.preflight.compiler import _options, slice_devices
from pretrain_xla.preflight.topology import resolve_topology

devices = slice_devices(resolve_topology("v5e-8"))

class Compiled(Exception):
    pass

def compile_it(run):
    proto = torch_xla._XLAC._get_xla_tensors_hlo_proto([run()])
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(proto))
    with mlir.make_ir_context() as context:
        bytecode = mlir.module_to_bytecode(ir.Module.parse(text, context=context))
    listed = xla_client.DeviceList(tuple(devices))
    raise Compiled(devices[0].client.compile(bytecode, listed, _options(8, {})).hlo_modules()[0].to_string())

bench = XlaBench()
bench.sizes = dataclasses.replace(LARGE, side=256, products=4, stream_bytes=2**20, passes=3, collective_bytes=2**18)
bench._seconds = compile_it
found = {}
for name in ("matmul", "stream", *COLLECTIVES):
    try:
        bench.collective(name) if name in COLLECTIVES else getattr(bench, name)()
    except Compiled as compiled:
        found[name] = str(compiled)
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_compiler_keeps_what_is_counted() -> None:
    variables = environment(**ENVIRONMENT | {"CPU_NUM_DEVICES": "8"})
    done = forks.run(["-c", SCRIPT], variables, cwd=Path(__file__).parents[2])
    assert done.stdout, done.stderr[-3000:]
    programs: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert programs["matmul"].count(" convolution(") == 4
    entry = programs["stream"][programs["stream"].index("ENTRY") :]
    assert entry.count(" fusion(") == 3, "passes that are not one"
    for kind in ("all-reduce", "all-gather", "all-to-all"):
        assert f" {kind}(" in programs[kind]
    assert " collective-permute-start(" in programs["collective-permute"]
    assert " reduce-scatter(" not in programs["reduce-scatter"], "then it is no longer compared with an all-reduce"
    assert " all-reduce(" in programs["reduce-scatter"]
