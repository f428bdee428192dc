"""torchrun for one node of a Slurm job: it passes SIGUSR1 on, and ends with the exit status of the run.

Slurm sends a signal to what it started itself, which is torchrun and not the processes of the run. torchrun knows nothing of
SIGUSR1 and would die of it, and it ends with status 1 whatever its processes ended with. Here they hear of the time limit, save
and end with 128 + SIGUSR1 = 138, and their status is what the batch script decides by. The arguments are torchrun's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the processes that torchrun started."""
    me = os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            if parent == me:
                os.kill(int(path.parent.name), number)


def main(arguments: list[str]) -> int:
    """Run torchrun; returns the status of the process that failed first, as a shell shows it."""
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"process {rank} ended with status {status}", file=sys.stderr, flush=True)
        return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
