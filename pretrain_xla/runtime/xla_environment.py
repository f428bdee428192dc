"""Environment variables that PyTorch/XLA reads when it first touches a device, put right beforehand."""

from __future__ import annotations

import importlib.util
import os
import warnings

from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError

DEVICES = ("CPU", "TPU", "CUDA")

OVERLAP = {
    "xla_enable_async_all_reduce": "true",
    # The core itself sends and receives: a reduction goes on inside the matrix products that run beside it.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # Bytes. All gradients in one reduction, as without it, would have to wait for the last of them.
    "xla_jf_crs_combiner_threshold_in_bytes": "4000000",
}
"""Options of libtpu that let gradients be reduced beside the rest of the backward pass."""


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
        _register_cuda()
    warnings.filterwarnings("ignore", message=".*Replicating tensors already initialized.*")


def _set_compiler_options(options: dict[str, str]) -> None:
    """Before libtpu is loaded, which reads them once. What the user has set stays."""
    words = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    known = {word.lstrip("-").partition("=")[0] for word in words}
    words += [f"--{name}={value}" for name, value in options.items() if name not in known]
    if words:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(words)


def _register_cuda() -> None:
    """Load the CUDA plugin that JAX ships; torch_xla 2.9 no longer has one of its own. Unverified on a GPU."""
    found = importlib.util.find_spec("jax_plugins.xla_cuda12") if importlib.util.find_spec("jax_plugins") else None
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "PJRT_DEVICE=CUDA needs a PJRT plugin: pip install -r requirements-xla_cuda.txt; "
            "the tested way to a GPU is run_pretrain.py (--runtime torch)"
        )
    from torch_xla.experimental import plugins

    library = os.path.join(next(iter(found.submodule_search_locations)), "xla_cuda_plugin.so")

    class CudaPlugin(plugins.DevicePlugin):
        """JAX's CUDA PJRT plugin under torch_xla."""

        def library_path(self) -> str:
            return library

        def physical_chip_count(self) -> int:
            return int(os.environ.get("GPU_NUM_DEVICES", "1"))

    plugins.use_dynamic_plugins()
    plugins.register_plugin("CUDA", CudaPlugin())
