"""Corrects the environment variables of PyTorch/XLA before it reads them at its first use of a device."""

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
    # The core itself sends and receives, so that a reduction is fused with the matrix products that run at that time.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # Bytes. By default all gradients are in one reduction, which has to wait for the last of them.
    "xla_jf_crs_combiner_threshold_in_bytes": "4000000",
}
"""Options of libtpu that reduce gradients during the rest of the backward pass."""


_BF16 = "it would turn fp32 weights and sums into bf16; for bf16 products over fp32 weights use --mixed-precision bf16"
_FP16 = "PyTorch/XLA no longer knows it; for 16-bit products over fp32 weights use --mixed-precision bf16"
CHANGES_RESULTS = {
    "XLA_USE_BF16": _BF16,
    "XLA_DOWNCAST_BF16": _BF16,
    "XLA_USE_F16": _FP16,
    "XLA_USE_FP16": _FP16,
    "XLA_DOWNCAST_FP16": _FP16,
    "XLA_USE_32BIT_LONG": "it would cut 64-bit integers to 32 bits",
    "XLA_RNG_BIT_GENERATOR": "it would change the dropout masks of a seed",
    "XLA_DISABLE_FUNCTIONALIZATION": "it would lose updates of a tensor through its views",
    "XLA_USE_EAGER_DEBUG_MODE": "it would run each operation as a program of its own",
    "XLA_AUTO_SPMD": "tensors are sharded by --mesh-data, --mesh-fsdp and --mesh-tensor",
    "XLA_AUTO_SPMD_MESH": "tensors are sharded by --mesh-data, --mesh-fsdp and --mesh-tensor",
}
"""Variable of PyTorch/XLA that changes the results of a step → why it is ignored. The config alone decides the results.

Variables that only cost time or memory, or help to debug, are kept (XLA_NO_SPECIAL_SCALARS, XLA_ENABLE_PARAM_ALIASING,
XLA_DENSE_GATHER_FACTOR, XLA_SYNC_WAIT, XLA_IR_DEBUG, PT_XLA_DEBUG …). So are compiler options, which are only reported.
"""

OFF = ("", "0", "false", "default")
"""Values that mean that a variable is off."""

COMPILERS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Options of the XLA and TPU compilers, which the user sets on purpose."""

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
"""Options that torch_xla adds when it is imported. Child processes inherit them, for example from a notebook."""


def clear_environment(*, multiprocess: bool) -> list[str]:
    """Remove variables that would change the results of a run. Call it before importing torch_xla, which reads some of them.

    Args:
        multiprocess: whether the run has one process per device, for which XLA_USE_SPMD must not be set.

    Returns:
        A note for the user on each variable that was removed. A second call returns none.
    """
    notes = []
    for name, why in CHANGES_RESULTS.items():
        value = os.environ.pop(name, "")
        if value.lower() not in OFF:
            notes.append(f"{name}={value} is ignored: {why}")
    if "torch_xla" in sys.modules:
        return notes  # it has set the others itself
    if multiprocess and os.environ.pop("XLA_USE_SPMD", "").lower() not in OFF:
        notes.append("XLA_USE_SPMD is ignored: --mp-start-method runs one process per device")
    for name in COMPILERS:
        if words := [word for word in os.environ.get(name, "").split() if word not in TORCH_XLA_SETS]:
            notes.append(f"{name}={' '.join(words)} changes how this run is compiled; it is not saved in config.yaml")
    return notes


def compiler_options(parallel: ParallelConfig) -> dict[str, str]:
    """Options of the TPU compiler, by name without dashes, for a run and for preflight."""
    return dict(OVERLAP) if parallel.overlap_gradients else {}


def prepare_environment(parallel: ParallelConfig) -> None:
    """Choose a device if PJRT_DEVICE is not set, clear variables of hosted notebooks, and register the CUDA plugin if needed.

    Compiler options are added to LIBTPU_INIT_ARGS, unless they are already set there.

    Raises:
        UserError: PJRT_DEVICE is unknown, or its plugin is missing.
    """
    # Kaggle and Colab describe a pod that their TPU is no longer part of. A single host must not wait for others.
    if any(key.startswith(("KAGGLE_", "COLAB_")) for key in os.environ):
        os.environ.pop("TPU_PROCESS_ADDRESSES", None)
        os.environ.pop("CLOUD_TPU_TASK_ID", None)
    # jax only lowers the kernels. By itself it would open the TPU, too, that this process has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "PJRT_DEVICE" not in os.environ:
        from torch_xla._internal import tpu

        os.environ["PJRT_DEVICE"] = "TPU" if tpu.num_available_chips() > 0 else "CPU"
    name = os.environ["PJRT_DEVICE"]
    if name not in DEVICES:
        raise UserError(f"PJRT_DEVICE={name}: unknown device; use one of {', '.join(DEVICES)}")
    if name == "TPU":
        from torch_xla._internal import tpu

        if tpu.num_available_chips() == 0:
            raise UserError("PJRT_DEVICE=TPU, but this host has no TPU: set PJRT_DEVICE=CPU to run here")
        _set_compiler_options(compiler_options(parallel))
    if name == "CUDA":
        library = _cuda_plugin()
        from pretrain_xla.runtime.xla.cuda import register_cuda

        register_cuda(library)
    warnings.filterwarnings("ignore", message=".*Replicating tensors already initialized.*")


def no_such_device(error: RuntimeError) -> UserError:
    """The error for a device that PyTorch/XLA cannot open."""
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"PJRT_DEVICE={os.environ['PJRT_DEVICE']}: no such device ({reason}); set PJRT_DEVICE=CPU to run here"
    )


def _set_compiler_options(options: dict[str, str]) -> None:
    """Must be called before libtpu is loaded, which reads them once. Options of the user are kept."""
    words = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    known = {word.lstrip("-").partition("=")[0] for word in words}
    words += [f"--{name}={value}" for name, value in options.items() if name not in known]
    if words:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(words)


def _cuda_plugin() -> str:
    """Path of JAX's CUDA plugin.

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
            "PJRT_DEVICE=CUDA, but this host shows no NVIDIA GPU: set PJRT_DEVICE=CPU to run here, "
            "or GPU_NUM_DEVICES to the number of GPUs if there are some"
        )
    return library
