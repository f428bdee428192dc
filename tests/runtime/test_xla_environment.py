"""What is corrected or refused before PyTorch/XLA touches a device."""

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
from pretrain_xla.runtime.xla.environment import (
    CHANGES_RESULTS,
    OVERLAP,
    clear_environment,
    compiler_options,
    prepare_environment,
)

ROOT = Path(__file__).parents[2]
POD = {"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "3"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the environment without variables of notebooks and pods, with PJRT_DEVICE=CPU."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("KAGGLE_", "COLAB_")) and key not in POD
    }
    monkeypatch.setattr(os, "environ", kept | {"PJRT_DEVICE": "CPU"})


@pytest.mark.parametrize("notebook", ["KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"])
def test_pod_variables_of_a_hosted_notebook_are_removed(notebook: str) -> None:
    os.environ.update(POD | {notebook: "x", "TPU_ACCELERATOR_TYPE": "v3-8"})
    prepare_environment(ParallelConfig())
    assert not POD.keys() & os.environ.keys()
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v3-8"
    assert os.environ["PJRT_DEVICE"] == "CPU"


def test_jax_does_not_open_the_tpu_beside_torch_xla() -> None:
    prepare_environment(ParallelConfig())
    assert os.environ["JAX_PLATFORMS"] == "cpu"


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


@pytest.mark.parametrize("name", CHANGES_RESULTS)
def test_a_variable_that_changes_results_is_removed_with_a_note(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ[name] = "1"
    (line,) = [note for note in clear_environment(multiprocess=False) if note.startswith("XLA_") and name in note]
    assert line == f"{name}=1 is ignored: {CHANGES_RESULTS[name]}"
    assert name not in os.environ
    if "16" in name:
        assert "use --mixed-precision bf16" in line
    os.environ[name] = "0"
    assert clear_environment(multiprocess=False) == [], "0 means off"


def test_the_spmd_variable_does_not_overrule_multiprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    os.environ["XLA_USE_SPMD"] = "1"
    assert clear_environment(multiprocess=False) == []
    assert os.environ["XLA_USE_SPMD"] == "1", "what a run does anyway"
    (line,) = clear_environment(multiprocess=True)
    assert line.startswith("XLA_USE_SPMD is ignored: ")
    assert "XLA_USE_SPMD" not in os.environ


def test_xla_flags_are_kept_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=true"
    (line,) = clear_environment(multiprocess=False)
    assert line.startswith("XLA_FLAGS=--xla_cpu_enable_fast_math=true changes how this run is compiled")
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"


def test_xla_flags_that_torch_xla_sets_itself_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    os.environ["XLA_FLAGS"] = (
        " --xla_cpu_enable_fast_math=false"  # inherited from a process that has imported torch_xla
    )
    assert clear_environment(multiprocess=False) == []
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    (line,) = clear_environment(multiprocess=False)
    assert line.startswith("XLA_FLAGS=--xla_backend_optimization_level=0 changes")


def test_options_of_the_tpu_compiler_are_set_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    tpu = types.SimpleNamespace(num_available_chips=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch_xla._internal", types.SimpleNamespace(tpu=tpu))
    os.environ |= {"PJRT_DEVICE": "TPU", "LIBTPU_INIT_ARGS": "--xla_enable_async_all_reduce=false --other=1"}
    prepare_environment(ParallelConfig())
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_enable_async_all_reduce=false --other=1"
    prepare_environment(ParallelConfig(overlap_gradients=True))
    options = os.environ["LIBTPU_INIT_ARGS"].split()
    assert options[:2] == ["--xla_enable_async_all_reduce=false", "--other=1"], "what the user has set stays"
    assert {option.split("=")[0] for option in options} == {"--other", *(f"--{name}" for name in OVERLAP)}
    assert len(options) == 1 + len(OVERLAP)
    assert not compiler_options(ParallelConfig())


# In a subprocess, because counting chips imports torch_xla.
CHIPS = """
import os
from torch_xla._internal import tpu
from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.xla.environment import prepare_environment
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
# PyTorch/XLA would round the value of the last line to bf16.
import torch
from pretrain_xla.config import RunConfig
from pretrain_xla.runtime import start
os.environ["PJRT_DEVICE"] = "CPU"
runtime = start(RunConfig())
# The runtime of a TPU VM, as far as a CPU allows: the PCI bus lists a v5e or v3, and the device is a CPU.
import sys
from pathlib import Path
from pretrain_xla.runtime import tpu_chip
from pretrain_xla.runtime.xla import runtime as xla
plain, xla.xr.device_type = xla.xr.device_type, lambda: "TPU"
for chip in ("v5e", "v3"):
    tpu_chip.PCI_DEVICES = Path(sys.argv[1]) / chip
    tpu_runtime = xla.XlaRuntime(RunConfig())
    print(f"{chip}: {tpu_runtime.device_name}, {tpu_runtime.peak_flops}, {tpu_runtime.attention}, {tpu_runtime.warnings}")
xla.xr.device_type = plain
print("kept:", torch.tensor(1 + 2**-12).to(runtime.device).cpu().item() == 1 + 2**-12, runtime.attention)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_without_a_tpu_the_cpu_is_used_tpu_is_refused_and_fp32_stays(tmp_path: Path) -> None:
    for chip, device in (("v5e", "0x0063"), ("v3", "0x0027")):
        card = tmp_path / chip / "0000:00:05.0"
        card.mkdir(parents=True)
        (card / "vendor").write_text("0x1ae0\n")
        (card / "device").write_text(device + "\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_USE_BF16": "1", "XLA_DOWNCAST_BF16": "1"}
    environment |= {"GCE_METADATA_HOST": "127.0.0.1:9"}  # nothing listens there
    done = subprocess.run(
        [sys.executable, "-c", CHIPS, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "there is a TPU here" in done.stdout:
        pytest.skip("there is a TPU here")
    assert "PJRT_DEVICE=TPU, but this host has no TPU: set PJRT_DEVICE=CPU" in done.stdout
    assert "v5e: TPU v5e, 197000000000000.0, the kernel for v5e, ()" in done.stdout, done.stdout
    assert (
        "v3: TPU, None, plain: the kernels are for TPUs (v4, v5e, v5p, v6e), ('the TPU of this host does not report"
        in done.stdout
    )
    assert "kept: True plain: the kernels are for TPUs" in done.stdout, done.stdout
    assert "note: XLA_USE_BF16=1 is ignored: " in done.stderr
    assert "note: XLA_DOWNCAST_BF16=1 is ignored: " in done.stderr


# A package in place of JAX's plugin, whose library is not a plugin: as much as can be tested without a GPU.
CUDA = """
import os
from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.runtime import load_xla, start

def print_error(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        print(error)

def nothing(index):
    raise AssertionError("must not be reached")

if __name__ == "__main__":
    config = build_config({"parallel": {"mp_start_method": "spawn"}}, "here")
    load_xla(config)
    from pretrain_xla.runtime.xla.launch import launch
    print_error(launch, config, nothing)
    os.environ["GPU_NUM_DEVICES"] = "1"
    print_error(launch, config, nothing)
    print_error(start, build_config({}, "here"))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_every_process_finds_the_cuda_plugin_and_without_a_gpu_there_is_one_error(tmp_path: Path) -> None:
    plugin = tmp_path / "jax_plugins" / "xla_cuda12"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    library = plugin / "xla_cuda_plugin.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", library], input=b"int nothing;", check=True)
    (tmp_path / "script.py").write_text(CUDA)
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    environment = os.environ | {"PYTHONPATH": path, "PJRT_DEVICE": "CUDA", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    without, spawned, spmd = done.stdout.splitlines()
    assert without.startswith("PJRT_DEVICE=CUDA, but this host shows no NVIDIA GPU: set PJRT_DEVICE=CPU to run here")
    expected = f"PJRT_DEVICE=CUDA: no such device (GetPjrtApi not found in {library}); set PJRT_DEVICE=CPU to run here"
    assert spawned == spmd == expected
