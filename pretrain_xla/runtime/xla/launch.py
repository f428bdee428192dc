"""One process for each device of this host: PJRT multiprocessing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch_xla

from pretrain_xla.config import ParallelConfig, RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.xla.environment import no_such_device, prepare_environment


class Replica:
    """The function that runs in each process that `launch` starts.

    torch_xla looks for the device's plugin there before it calls the function, and only the process that registered a plugin
    knows it. Unpickling comes even before, so that is when the environment is prepared.
    """

    def __init__(self, main: Callable[[int], None], parallel: ParallelConfig) -> None:
        self._main, self._parallel = main, parallel

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        prepare_environment(self._parallel)

    def __call__(self, index: int) -> None:
        """Run one replica."""
        self._main(index)


def launch(config: RunConfig, main: Callable[[int], None]) -> None:
    """Run `main(index)` once for each device of this host (PJRT multiprocessing).

    Raises:
        UserError: on a CPU with more than one device, where replicas compile different collectives and deadlock; or the devices
            cannot be opened.
    """
    parallel = config.parallel
    prepare_environment(parallel)
    count = int(os.environ.get("CPU_NUM_DEVICES", "1"))
    if os.environ["PJRT_DEVICE"] == "CPU" and count > 1:
        raise UserError(
            f"multiprocessing with {count} CPU devices deadlocks in XLA: leave out --mp-start-method to use SPMD, "
            "which runs on virtual CPU devices, or set CPU_NUM_DEVICES=1"
        )
    if os.environ["PJRT_DEVICE"] == "CPU":
        main(0)  # one replica: the same code path, without another process
        return
    try:
        torch_xla.launch(Replica(main, parallel), start_method=parallel.mp_start_method or "spawn")
    except RuntimeError as error:
        # The cause holds the other process's trace: did it reach `Replica.__call__`?
        if os.path.basename(__file__) in str(error.__cause__):
            raise
        raise no_such_device(error) from None
