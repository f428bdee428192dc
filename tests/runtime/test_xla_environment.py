"""What is put right, or refused, before PyTorch/XLA touches a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.xla_environment import OVERLAP, compiler_options, prepare_environment

ROOT = Path(__file__).parents[2]
POD = {"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "3"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the environment that knows of no notebook, pod or device but a CPU."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("KAGGLE_", "COLAB_")) and key not in POD
    }
    monkeypatch.setattr(os, "environ", kept | {"PJRT_DEVICE": "CPU"})


@pytest.mark.parametrize("notebook", ["KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"])
def test_what_a_hosted_notebook_says_of_its_pod_is_forgotten(notebook: str) -> None:
    os.environ.update(POD | {notebook: "x", "TPU_ACCELERATOR_TYPE": "v3-8"})
    prepare_environment(ParallelConfig())
    assert not POD.keys() & os.environ.keys()
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v3-8"
    assert os.environ["PJRT_DEVICE"] == "CPU"


def test_a_real_pod_keeps_its_description() -> None:
    os.environ.update(POD)
    prepare_environment(ParallelConfig())
    assert {key: os.environ[key] for key in POD} == POD


@pytest.mark.parametrize("name", ["NPU", "cpu", "GPU", ""])
def test_an_unknown_device_is_refused(name: str) -> None:
    os.environ["PJRT_DEVICE"] = name
    with pytest.raises(UserError) as caught:
        prepare_environment(ParallelConfig())
    assert f"PJRT_DEVICE={name}: unknown device" in str(caught.value)
    assert "CPU, TPU, CUDA" in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="there is a CUDA plugin here")
def test_cuda_without_its_plugin_says_what_to_install() -> None:
    os.environ["PJRT_DEVICE"] = "CUDA"
    with pytest.raises(UserError, match=r"pip install -r requirements-xla_cuda\.txt"):
        prepare_environment(ParallelConfig())


def test_the_tpus_compiler_is_told_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    tpu = types.SimpleNamespace(num_available_chips=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch_xla._internal", types.SimpleNamespace(tpu=tpu))
    os.environ |= {"PJRT_DEVICE": "TPU", "LIBTPU_INIT_ARGS": "--xla_enable_async_all_reduce=false --other=1"}
    prepare_environment(ParallelConfig())
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_enable_async_all_reduce=false --other=1"
    prepare_environment(ParallelConfig(overlap_gradients=True))
    words = os.environ["LIBTPU_INIT_ARGS"].split()
    assert words[:2] == ["--xla_enable_async_all_reduce=false", "--other=1"], "what the user has set stays"
    assert {word.split("=")[0] for word in words} == {"--other", *(f"--{name}" for name in OVERLAP)}
    assert len(words) == 1 + len(OVERLAP)
    assert not compiler_options(ParallelConfig())


# In a process of its own, because counting chips imports torch_xla.
CHIPS = """
import os
from torch_xla._internal import tpu
from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.xla_environment import prepare_environment
if tpu.num_available_chips():
    print("there is a TPU here")
else:
    os.environ.pop("PJRT_DEVICE", None)
    prepare_environment(ParallelConfig())
    assert os.environ["PJRT_DEVICE"] == "CPU", os.environ["PJRT_DEVICE"]
    os.environ["PJRT_DEVICE"] = "TPU"
    try:
        prepare_environment(ParallelConfig())
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_without_a_tpu_the_cpu_is_taken_and_a_tpu_refused() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHIPS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "there is a TPU here" in done.stdout:
        pytest.skip("there is a TPU here")
    assert "PJRT_DEVICE=TPU, but this machine has no TPU: set PJRT_DEVICE=CPU" in done.stdout
