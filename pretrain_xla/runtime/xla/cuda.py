"""GPUs through XLA, with the PJRT plugin that JAX ships, since torch_xla 2.9 no longer has its own. Unverified on a GPU."""

from __future__ import annotations

import os
from typing import Any

from torch_xla.experimental import plugins

from pretrain_xla.runtime.xla.gpu_count import gpu_count


class CudaPlugin(plugins.DevicePlugin):
    """JAX's CUDA plugin under torch_xla, with the options of the plugin of torch_xla 2.8, which is built from the same code."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self._library = library

    def library_path(self) -> str:
        """Path of the plugin."""
        return self._library

    def physical_chip_count(self) -> int:
        """Number of GPUs of this host, and so of processes that `launch` starts."""
        return gpu_count()

    def configure_multiprocess(self, local_rank: int, local_world_size: int) -> None:
        """Called in each process that `launch` starts."""
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(local_world_size))

    def client_create_options(self) -> dict[str, Any]:
        """One GPU for each of several processes; all of them for a single process."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        gpus = [local_rank] if processes > 1 else list(range(gpu_count()))
        return {
            "platform_name": "gpu",
            "allocator": "default",
            "visible_devices": gpus,
            "node_id": int(os.environ.get("RANK", str(local_rank))),
            "num_nodes": int(os.environ.get("WORLD_SIZE", str(processes))),
        }

    def requires_xla_coordinator(self) -> bool:
        """Processes find each other through torch_xla's service."""
        return True


def register_cuda(library: str) -> None:
    """Register the device CUDA with torch_xla, once in each process."""
    if "CUDA" not in plugins._plugin_registry:
        plugins.use_dynamic_plugins()
        plugins.register_plugin("CUDA", CudaPlugin(library))
