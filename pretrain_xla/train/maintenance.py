"""Notices that Google's cloud will take a TPU's host away: maintenance, and preemption of a spot VM.

The host's metadata server announces both, maintenance about a minute before. A VM's
shutdown sends SIGTERM to its services, and not to what was started over SSH. So a thread of each host asks the server every few
seconds, which also is what makes it announce at all. A notice stops the run as SIGTERM does: every host after the same step.

Only a TPU VM is asked: where there is no such server (`TPU_SKIP_MDS_QUERY`: GKE, Kaggle) SIGTERM comes to the run itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

from pretrain_xla.runtime import Hosts, Runtime
from pretrain_xla.runtime.metadata_server import instance_value

INTERVAL = 3.0
"""Seconds between two questions. A preempted VM has 30 seconds."""
CALM = (None, "NONE", "FALSE", "MIGRATE_ON_HOST_MAINTENANCE")
"""Answers that announce nothing; a VM that migrates goes on."""
QUESTIONS = {"maintenance-event": "maintenance of the host", "preempted": "preemption"}


def is_announced(runtime: Runtime, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs on a TPU whose host has a metadata server."""
    skips = environment.get("TPU_SKIP_MDS_QUERY", "").lower() not in ("", "0", "false")
    return runtime.name == "xla" and environment.get("PJRT_DEVICE") == "TPU" and not skips


@contextlib.contextmanager
def watching_notices(runtime: Runtime) -> Iterator[None]:
    """While it is open, a notice for this host stops the run on all hosts. Does nothing where there are no notices."""
    if not is_announced(runtime):
        yield
        return
    with asking(runtime.hosts):
        yield


@contextlib.contextmanager
def asking(hosts: Hosts, interval: float = INTERVAL) -> Iterator[None]:
    """While it is open, a thread asks the metadata server, and a notice stops the run.

    Args:
        hosts: the processes of the run.
        interval: seconds between two questions.
    """
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(hosts.request_stop, left, interval), name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()  # the thread may be waiting for an answer: it ends after that


def _watch(stop: Callable[[int], None], left: threading.Event, interval: float) -> None:
    while not left.is_set():
        for name, what in QUESTIONS.items():
            answer = instance_value(name)
            if answer in CALM or left.is_set():
                continue
            line = f"the cloud announces {what} ({name}: {answer}): the run saves and stops as after SIGTERM\n"
            os.write(2, line.encode())
            stop(signal.SIGTERM)
            return
        left.wait(interval)
