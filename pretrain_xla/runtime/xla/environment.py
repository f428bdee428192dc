"""Environment variables that PyTorch/XLA reads when it first touches a device, corrected beforehand."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.xla.gpu_count import gpu_count

DEVICES = ("CPU", "TPU", "CUDA")

OVERLAP = {
    "xla_enable_async_all_reduce": "true",
    # The core itself sends and receives: a reduction goes on inside the matrix products that run meanwhile.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # Bytes. All gradients in one reduction, as without it, would have to wait for the last of them.
    "xla_jf_crs_combiner_threshold_in_bytes": "4000000",
}
"""Options of libtpu that let gradients be reduced during the rest of the backward pass."""


_BF16 = "it would turn fp32 weights and sums into bf16; for bf16 products over fp32 weights use --mixed-precision bf16"
_FP16 = "PyTorch/XLA no longer knows it; for 16-bit products over fp32 weights use --mixed-precision bf16"
CHANGES_RESULTS = {
    "XLA_USE_BF16": _BF16,
    "XLA_DOWNCAST_BF16": _BF16,
    "XLA_USE_F16": _FP16,
    "XLA_USE_FP16": _FP16,
    "XLA_DOWNCAST_FP16": _FP16,
    "XLA_USE_32BIT_LONG": "it would cut 64-bit integers to 32 bits",
    "XLA_RNG_BIT_GENERATOR": "it would draw other dropout than a run with the same seed elsewhere",
    "XLA_DISABLE_FUNCTIONALIZATION": "it would lose updates of a tensor through its views",
    "XLA_USE_EAGER_DEBUG_MODE": "it would run each operation as a program of its own",
    "XLA_AUTO_SPMD": "tensors are split by --mesh-data, --mesh-fsdp and --mesh-tensor",
    "XLA_AUTO_SPMD_MESH": "tensors are split by --mesh-data, --mesh-fsdp and --mesh-tensor",
}
"""Variables of PyTorch/XLA that change what a step computes, and why they are not followed: a config must say all of it.

Left alone are those that only cost time or memory, or help to look (XLA_NO_SPECIAL_SCALARS, XLA_ENABLE_PARAM_ALIASING,
XLA_DENSE_GATHER_FACTOR, XLA_SYNC_WAIT, XLA_IR_DEBUG, PT_XLA_DEBUG …), and options of the compilers, which are only repeated.
"""

OFF = ("", "0", "false", "default")
"""Values that mean that a variable is not in use."""

COMPILERS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Options of XLA's and of the TPU's compiler; whoever sets them means them."""

TORCH_XLA_SETS = frozenset(
    {
        "--xla_cpu_enable_fast_math=false",
        "--xla_tpu_use_enhanced_launch_barrier=false",
        "--xla_latency_hiding_scheduler_rerun=1",
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        "--xla_tpu_enable_flash_attention=false",
        "--xla_enable_async_all_gather=true",
        "--xla_enable_async_collective_permute=true",
    }
)
"""Options that torch_xla adds as it is imported: what a process that has done so starts (a notebook, for one) has them, too."""


def clear_environment(*, multiprocess: bool) -> list[str]:
    """Forget variables that would change the results of a run, before torch_xla is imported, which reads some at once.

    Args:
        multiprocess: whether the run has one process a device, which XLA_USE_SPMD forbids.

    Returns:
        A line for the user on each that was set; nothing the next time.
    """
    notes = []
    for name, why in CHANGES_RESULTS.items():
        value = os.environ.pop(name, "")
        if value.lower() not in OFF:
            notes.append(f"{name}={value} is set, and not followed: {why}")
    if "torch_xla" in sys.modules:
        return notes  # which has set the others itself
    if multiprocess and os.environ.pop("XLA_USE_SPMD", "").lower() not in OFF:
        notes.append("XLA_USE_SPMD is set, and not followed: --mp-start-method runs one process a device")
    for name in COMPILERS:
        if words := [word for word in os.environ.get(name, "").split() if word not in TORCH_XLA_SETS]:
            notes.append(f"{name}={' '.join(words)} changes how this run is compiled; config.yaml does not keep it")
    return notes


def compiler_options(parallel: ParallelConfig) -> dict[str, str]:
    """Options of the TPU's compiler, by name without dashes, that a run sets and preflight compiles with."""
    return dict(OVERLAP) if parallel.overlap_gradients else {}


def prepare_environment(parallel: ParallelConfig) -> None:
    """Choose a device when none is named, clear what hosted notebooks leave behind, and register a CUDA plugin on request.

    The compiler's options go into LIBTPU_INIT_ARGS, unless they are there already.

    Raises:
        UserError: PJRT_DEVICE names no device that we know, or its plugin is missing.
    """
    # Kaggle and Colab describe the pod that their TPU once was part of; a single host must not wait for the others.
    if any(key.startswith(("KAGGLE_", "COLAB_")) for key in os.environ):
        os.environ.pop("TPU_PROCESS_ADDRESSES", None)
        os.environ.pop("CLOUD_TPU_TASK_ID", None)
    if "PJRT_DEVICE" not in os.environ:
        from torch_xla._internal import tpu

        os.environ["PJRT_DEVICE"] = "TPU" if tpu.num_available_chips() > 0 else "CPU"
    name = os.environ["PJRT_DEVICE"]
    if name not in DEVICES:
        raise UserError(f"PJRT_DEVICE={name}: unknown device; use one of {', '.join(DEVICES)}")
    if name == "TPU":
        from torch_xla._internal import tpu

        if tpu.num_available_chips() == 0:
            raise UserError("PJRT_DEVICE=TPU, but this machine has no TPU: set PJRT_DEVICE=CPU to run here")
        _set_compiler_options(compiler_options(parallel))
    if name == "CUDA":
        library = _cuda_plugin()
        from pretrain_xla.runtime.xla.cuda import register_cuda

        register_cuda(library)
    warnings.filterwarnings("ignore", message=".*Replicating tensors already initialized.*")


def no_such_device(error: RuntimeError) -> UserError:
    """What to say where PyTorch/XLA cannot open the device."""
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"PJRT_DEVICE={os.environ['PJRT_DEVICE']}: no such device ({reason}); set PJRT_DEVICE=CPU to run here"
    )


def _set_compiler_options(options: dict[str, str]) -> None:
    """Before libtpu is loaded, which reads them once. What the user has set stays."""
    words = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    known = {word.lstrip("-").partition("=")[0] for word in words}
    words += [f"--{name}={value}" for name, value in options.items() if name not in known]
    if words:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(words)


def _cuda_plugin() -> str:
    """Path of the CUDA plugin that JAX ships.

    Raises:
        UserError: it is not installed, or the host has no GPU.
    """
    found = importlib.util.find_spec("jax_plugins.xla_cuda12") if importlib.util.find_spec("jax_plugins") else None
    library = ""
    if found is not None and found.submodule_search_locations:
        library = os.path.join(next(iter(found.submodule_search_locations)), "xla_cuda_plugin.so")
    if not os.path.isfile(library):
        raise UserError(
            "PJRT_DEVICE=CUDA needs a PJRT plugin: pip install -r requirements-xla_cuda.txt; "
            "the tested way to a GPU is run_pretrain.py (--runtime torch)"
        )
    if gpu_count() == 0:
        raise UserError(
            "PJRT_DEVICE=CUDA, but this machine shows no NVIDIA GPU: set PJRT_DEVICE=CPU to run here, "
            "or GPU_NUM_DEVICES to the number of GPUs if there are some"
        )
    return library
