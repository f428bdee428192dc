"""The one place where devices differ. `start(config)` returns the runtime; nothing outside asks which one it is.

`base.py` is the protocol of a runtime; `xla/` and `torch_runtime.py` implement it. `sharding.py` has the table of parameters
and mesh axes, `rows.py` decides which rows a host reads, `chips.py` lists the TPU generations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import ModuleType

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.base import Runtime
from pretrain_xla.runtime.tpu_chip import DESCRIBE, check_description, pci_chips
from pretrain_xla.runtime.xla.environment import clear_environment

# Before torch_xla is imported: on every compilation its C++ part announces that Shardy will replace GSPMD.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["Runtime", "load_xla", "say", "start"]


def start(config: RunConfig) -> Runtime:
    """Open the devices that the config asks for, and print notes about them for the user on stderr.

    Raises:
        UserError: torch_xla is not installed, there are no such devices, or the mesh does not fit them.
    """
    if config.parallel.runtime == "torch":
        from pretrain_xla.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(config)
    xla, notes = load_xla(config)
    runtime: Runtime = xla.XlaRuntime(config)
    if runtime.is_main:
        say(notes)
        say(runtime.warnings, "warning")
    return runtime


def load_xla(config: RunConfig) -> tuple[ModuleType, list[str]]:
    """The module of the xla runtime, and a line on each environment variable that is ignored.

    Raises:
        UserError: torch_xla is not installed, or cannot determine which TPU this is.
    """
    notes = clear_environment(multiprocess=config.parallel.is_multiprocess)
    if "torch_xla" not in sys.modules and (warning := check_description()):
        say([warning], "warning")
    try:
        from pretrain_xla.runtime.xla import runtime as xla
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "torch_xla":
            raise UserError(
                "runtime=xla needs torch_xla: pip install -r requirements-xla_tpu.txt, or use --runtime torch"
            ) from None
        raise
    except OSError as error:  # torch_xla asks the metadata server at import
        if not pci_chips():
            raise
        raise UserError(f"PyTorch/XLA cannot determine which TPU this is ({error}); {DESCRIBE}") from None
    return xla, notes


def say(lines: Iterable[str], kind: str = "note") -> None:
    """Print lines on stderr: what a model writes goes to stdout."""
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr, flush=True)
