"""Where the processes of a run meet: under torchrun, on the hosts of a TPU slice, or in a rehearsal of one.

On a TPU the addresses come from its environment (variables, or the metadata server), and the store opens before the devices do.
torch_xla's own way (`init_method="xla://"`) finds the first host by running a program on the devices. These open only when
every host is there, so a host that fails before, on a wrong path or a full disk, would leave the others waiting in silence.

A rehearsal is a pod in small, for tests and for trying out what a pod does when hosts die. XLA's CPU client cannot join
processes in one program, so each process computes the whole step on its own virtual devices; all else is as on a pod.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pretrain_xla.errors import UserError
from pretrain_xla.runtime.hosts import Hosts, JoinedHosts
from pretrain_xla.runtime.launched import RENDEZVOUS, launched
from pretrain_xla.system_faults import reason

REHEARSAL = "PRETRAIN_XLA_REHEARSAL"
"""Environment variable: `INDEX/COUNT@ADDRESS:PORT`, such as `0/2@127.0.0.1:12355`, on `PJRT_DEVICE=CPU`."""

PORT = 12355
"""Port of the store on a pod's first host, unless MASTER_PORT names another. torch_xla's default, too."""

COMES = 600.0
"""Seconds to wait for the process that serves the store, and then for the others."""


@dataclass(frozen=True)
class Meeting:
    """Where to meet, and as whom. serves: whether this process serves the store. prefix: of all keys, for a shared store."""

    index: int
    count: int
    machines: int
    address: str
    port: int
    serves: bool
    prefix: str = "hosts"


def torchrun_meeting(environment: Mapping[str, str] = os.environ) -> Meeting | None:
    """The meeting that the launcher's variables describe. None means that this process runs alone.

    Raises:
        UserError: some of the variables are missing.
    """
    one = launched(environment)
    if not one.distributed:
        return None
    # torchrun serves a store itself, which outlives its processes: each attempt has its own keys.
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return Meeting(
        one.rank, one.world_size, one.hosts, address, port, one.rank == 0 and not agent, f"hosts/attempt_{attempt}"
    )


def rehearsal_meeting(environment: Mapping[str, str] = os.environ) -> Meeting | None:
    """The meeting of a rehearsal. None means that there is none.

    Raises:
        UserError: the variable cannot be parsed, or the devices are real ones.
    """
    text = environment.get(REHEARSAL)
    if not text:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)@([^@/]+):(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"{REHEARSAL}={text!r} is not INDEX/COUNT@ADDRESS:PORT, such as 0/2@127.0.0.1:{PORT}")
    if environment.get("PJRT_DEVICE") != "CPU":
        raise UserError(
            f"{REHEARSAL} needs PJRT_DEVICE=CPU: on real devices, every process would train a model of its own"
        )
    index, count = int(found[1]), int(found[2])
    return Meeting(index, count, count, found[3], int(found[4]), index == 0)


def pod_meeting(
    addresses: list[str], worker: int, each: int = 1, local: int = 0, environment: Mapping[str, str] = os.environ
) -> Meeting | None:
    """The meeting of a process on a TPU's hosts.

    Args:
        addresses: of the hosts, in the order of their worker numbers.
        worker: this host's number.
        each: processes on each host.
        local: this process's number on its host.
        environment: MASTER_ADDR and MASTER_PORT name another place to meet than the first host.
    """
    if len(addresses) * each == 1:
        return None
    index = worker * each + local
    address = environment.get("MASTER_ADDR", addresses[0])
    port = int(environment.get("MASTER_PORT", PORT))
    return Meeting(index, len(addresses) * each, len(addresses), address, port, serves=index == 0)


def join(meeting: Meeting | None, silence: float, seconds: float = COMES) -> Hosts:
    """Meet the other processes of the run.

    Args:
        meeting: None means that there are no others.
        silence: seconds without a sign of life after which a process is lost.
        seconds: how long to wait for the others to come.

    Raises:
        UserError: the store cannot be served or reached.
        AnotherFailed: a process did not come.
    """
    if meeting is None:
        return Hosts()
    store = dist.PrefixStore(meeting.prefix, open_store(meeting, seconds))
    launched_by_another = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None
    return JoinedHosts(
        store,
        meeting.index,
        meeting.count,
        meeting.machines,
        silence,
        serves=meeting.serves,
        launcher=os.getppid() if launched_by_another else None,
        seconds=seconds,
    )


def open_store(meeting: Meeting, seconds: float = COMES) -> dist.TCPStore:
    """Serve the meeting's store, or connect to it within `seconds`.

    Raises:
        UserError: its port is in use, or nobody answers there.
    """
    where = f"{meeting.address}:{meeting.port}"
    if not meeting.serves:
        _wait_until_it_listens(meeting, where, seconds)
    try:
        return dist.TCPStore(
            meeting.address,
            meeting.port,
            meeting.count,
            meeting.serves,
            timedelta(seconds=60),
            wait_for_workers=False,
            multi_tenant=meeting.serves,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if meeting.serves:
            raise UserError(
                f"the processes of this run cannot meet at {where} ({reason(error)}): another run may still be there; end "
                "it, or name another port in MASTER_PORT"
            ) from None
        raise _out_of_reach(meeting, where, reason(error)) from None


def _wait_until_it_listens(meeting: Meeting, where: str, seconds: float) -> None:
    deadline, told = time.monotonic() + seconds, time.monotonic() + 10
    while True:
        try:
            socket.create_connection((meeting.address, meeting.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise _out_of_reach(meeting, where, reason(error)) from None
        if time.monotonic() > told:
            told = float("inf")
            print(
                f"note: process {meeting.index} of {meeting.count} waits for the first at {where}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.2)


def _out_of_reach(meeting: Meeting, where: str, why: str) -> UserError:
    return UserError(
        f"process {meeting.index} of {meeting.count} cannot reach the others at {where} ({why}): start all of them, or "
        f"unset {' '.join(name for name in (*RENDEZVOUS, REHEARSAL) if name in os.environ)} to run alone"
    )
