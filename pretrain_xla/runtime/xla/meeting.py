"""Where the processes of a run on a TPU meet, by its environment: variables, or the metadata server of Google's cloud."""

from __future__ import annotations

import os

import torch_xla.runtime as xr
from torch_xla._internal import tpu

from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.runtime.rendezvous import REHEARSAL, Meeting, pod_meeting, rehearsal_meeting


def find_meeting(parallel: ParallelConfig) -> Meeting | None:
    """The meeting of this process. None means that it runs alone.

    `prepare_environment` has chosen the device. With one process a device, the devices are open; under SPMD they need not be.

    Raises:
        UserError: the environment does not say who the hosts are.
    """
    if (rehearsal := rehearsal_meeting()) is not None:
        if parallel.is_multiprocess:
            raise UserError(f"{REHEARSAL} needs SPMD: leave out --mp-start-method")
        return rehearsal
    if os.environ["PJRT_DEVICE"] != "TPU":
        return None
    # As for the devices: a hosted notebook describes a pod that its TPU is not part of.
    hosted = any(key.startswith(("KAGGLE_", "COLAB_")) for key in os.environ)
    try:
        addresses = ["localhost"] if hosted else tpu.get_worker_ips()
        worker = 0 if len(addresses) == 1 else tpu.worker_id()
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"the hosts of this TPU cannot be found ({type(error).__name__}: {error}): set TPU_WORKER_HOSTNAMES and "
            "TPU_WORKER_ID, and TPU_SKIP_MDS_QUERY=1"
        ) from None
    each, local = (xr.local_device_count(), xr.local_ordinal()) if parallel.is_multiprocess else (1, 0)
    return pod_meeting(addresses, worker, each, local)


def check_processes(hosts: Hosts, processes: int) -> None:
    """Compare with what the devices say, once they are open.

    Raises:
        UserError: they are of another number of processes.
    """
    if processes != hosts.count and not os.environ.get(REHEARSAL):
        raise UserError(
            f"the TPU's devices belong to {processes} processes, and its environment names {hosts.count}: every host needs the "
            "same TPU_WORKER_HOSTNAMES, or none; runs over several slices are not supported"
        )
