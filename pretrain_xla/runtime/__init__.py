"""The one place where devices differ. `start(config)` returns the runtime; nothing outside asks which one it is.

`base.py` is the protocol of a runtime; `xla/` and `torch_runtime.py` implement it. `sharding.py` has the table of parameters
and mesh axes, `rows.py` decides which rows a host reads, `chips.py` lists the TPU generations. `hosts.py` is how the processes
of a run agree; `rendezvous.py` is where they meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import ModuleType

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.base import Runtime
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.runtime.launched import launched
from pretrain_xla.runtime.rendezvous import COMES, join, torchrun_meeting
from pretrain_xla.runtime.tpu_chip import DESCRIBE, check_description, pci_chips
from pretrain_xla.runtime.xla.environment import clear_environment, prepare_environment

# Before torch_xla is imported: on every compilation its C++ part announces that Shardy will replace GSPMD.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["Hosts", "Runtime", "join_hosts", "load_xla", "say", "start"]


def join_hosts(config: RunConfig, seconds: float = COMES) -> Hosts:
    """Meet the other processes of the run, before any device is opened, and print notes for the user on stderr.

    Args:
        config: of the run.
        seconds: how long to wait for the others to come.

    Raises:
        UserError: torch_xla is not installed, or the others cannot be reached.
        AnotherFailed: one of them did not come.
    """
    if config.parallel.runtime == "torch":
        if (note := launched().note) is not None:
            say([note])
        return join(torchrun_meeting(), config.parallel.host_timeout, seconds)
    _, notes = load_xla(config)
    from pretrain_xla.runtime.xla.meeting import find_meeting

    prepare_environment(config.parallel)
    hosts = join(find_meeting(config.parallel), config.parallel.host_timeout, seconds)
    if hosts.is_first:
        say(notes)
    return hosts


def start(config: RunConfig, hosts: Hosts | None = None) -> Runtime:
    """Open the devices that the config asks for, and print notes about them for the user on stderr.

    Args:
        config: of the run.
        hosts: from `join_hosts`, which is called if there are none yet.

    Raises:
        UserError: torch_xla is not installed, there are no such devices, or the mesh does not fit them.
    """
    hosts = join_hosts(config) if hosts is None else hosts
    with hosts:
        if config.parallel.runtime == "torch":
            from pretrain_xla.runtime.torch_runtime import TorchRuntime

            return TorchRuntime(config, hosts)
        xla, _ = load_xla(config)
        runtime: Runtime = xla.XlaRuntime(config, hosts)
        if runtime.is_main:
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
