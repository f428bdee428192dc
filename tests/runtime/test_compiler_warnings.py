"""XLA's warnings about tensors that it cannot reshard: provoked in the real compilers, and printed once in plain words."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_xla.preflight.client import ENVIRONMENT
from pretrain_xla.runtime.xla import compiler_warnings as compiler_warnings_module
from pretrain_xla.runtime.xla.compiler_warnings import compiler_warnings, in_words

ROOT = Path(__file__).parents[2]
MESSAGE = (
    "the compiler finds no direct way to reshard 1 tensor of the train step over the mesh, the largest "
    "f32[8,4,4] on one device: it copies them whole to every device first, which costs time and memory"
)
LINE = "W spmd.cc] [SPMD] Involuntary full rematerialization. It cannot go from sharding {a} to {b} for HLO operation %c.2 = "


def test_the_message_names_the_largest_tensor() -> None:
    assert in_words(["W another warning"], "the step") is None
    message = in_words([LINE + "f32[8,4]{1,0} copy", LINE + "bf16[1024,4]{1,0} copy", "other"], "the step") or ""
    assert "2 tensors of the step" in message
    assert "the largest bf16[1024,4] on one device" in message
    assert "1 tensor of the step over the mesh: it" in (in_words(["x " + LINE], "the step") or "")


def test_other_output_goes_to_stderr_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with compiler_warnings() as found:
        os.write(2, b"before\n" + LINE.encode() + b"f32[2]{0} copy\nafter\n")
    os.write(2, b"later\n")
    assert len(found) == 1
    assert capfd.readouterr().err == "before\nafter\nlater\n"


def test_a_crash_prints_its_reason() -> None:
    code = (
        "import os, runpy, sys, time\n"
        "with runpy.run_path(sys.argv[1])['compiler_warnings']():\n"
        "    os.write(2, b'F the reason\\n')\n    time.sleep(0.5)\n    os.abort()"
    )
    command = [sys.executable, "-c", code, str(compiler_warnings_module.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -6
    assert "F the reason" in done.stderr


# A tensor with shardings between which XLA's partitioner can convert only by replicating it.
CPU = """
from pretrain_xla.config import RunConfig
from pretrain_xla.runtime import start
import numpy as np, torch, torch_xla.distributed.spmd as xs
runtime = start(RunConfig())
mesh = xs.Mesh(np.arange(4), (2, 2), ("a", "b"))
x = torch.ones(8, 8, 8).to(runtime.device)
xs.mark_sharding(x, mesh, ("a", "b", None))
def train(x):
    y = xs.mark_sharding_with_gradients(torch.sin(x), mesh, (None, "a", "b"))
    return xs.mark_sharding_with_gradients(torch.cos(y), mesh, (("a", "b"), None, None)).exp()
step = runtime.compile(train, "train", tuple)
for _ in range(3):
    step(x)
"""
TPU = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pretrain_xla.runtime.xla.compiler_warnings import in_words, libtpu_log
jax.config.update("jax_use_shardy_partitioner", False)
mesh = Mesh(np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices).reshape(2, 2), ("a", "b"))
def train(x):
    y = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P(None, "a", "b")))
    return jnp.exp(jax.lax.with_sharding_constraint(jnp.cos(y), NamedSharding(mesh, P(("a", "b"), None, None))))
x = jax.ShapeDtypeStruct((8, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P("a", "b", None)))
jax.jit(train).lower(x).compile()
print("warning:", in_words(libtpu_log(), "the train step"), file=sys.stderr)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
@pytest.mark.parametrize("compiler", ["CPU", "TPU"])
def test_the_compilers_warning_is_printed_once_in_plain_words(compiler: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # jax sets it where another test of this process has imported it
    if compiler == "TPU":
        environment |= ENVIRONMENT | {"TPU_LOG_DIR": str(tmp_path)}
    code = {"CPU": CPU, "TPU": TPU}[compiler]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {MESSAGE}")
