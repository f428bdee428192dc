"""The one seam where machines differ. `start(config)` gives the runtime; nothing outside asks which one it is."""

from __future__ import annotations

import os

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.base import Runtime

# Before torch_xla is imported: its C++ part announces on every compilation that GSPMD will give way to Shardy one day.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["Runtime", "start"]


def start(config: RunConfig) -> Runtime:
    """Take hold of the devices that the config asks for.

    Raises:
        UserError: torch_xla is not installed, the devices are not there, or the mesh does not fit them.
    """
    if config.parallel.runtime == "torch":
        from pretrain_xla.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(config)
    try:
        from pretrain_xla.runtime.xla import XlaRuntime
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "torch_xla":
            raise UserError(
                "runtime=xla needs torch_xla: pip install -r requirements-xla_tpu.txt, or use --runtime torch"
            ) from None
        raise
    return XlaRuntime(config)
