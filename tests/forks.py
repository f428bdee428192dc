"""Runs Python commands, each in its own process, without the seconds that loading PyTorch takes.

Importing torch and the modules of it that torch_xla needs takes 2 to 5 s of CPU, most of a small command's time. So
`python tests/forks.py` imports these libraries once, and forks a process for each command. It imports neither the package,
nor torch_xla, nor anything that reads the environment on import: the command imports those itself, in its own environment,
as a new process would. It also exits as a new process does.

Two things differ from a new process: an import that the package lacks may have been made here already, and the order of
sets of strings is the same in all forks. `fresh=True` (tests/end_to_end/conftest.py) is for tests where that matters.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "torch._inductor.fx_passes.post_grad",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "functorch.compile",
    "aiohttp",
    "matplotlib.pyplot",
    "pydantic",
    "requests",
    "rich.progress",
    "tyro",
)


class Fork:
    """A started command. A server runs one at a time: for several, number the servers."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        cwd: Path,
        streams: Sequence[str],
        server: int = 0,
    ) -> None:
        self._server = _server(server)
        assert self._server.stdin
        assert self._server.stdout
        request = {"command": list(command), "cwd": str(cwd), "environment": environment, "streams": list(streams)}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())
        self.status: int | None = None

    def poll(self, timeout: float = 0) -> int | None:
        """The exit status (negative: the number of a signal), or None while the command runs."""
        assert self._server.stdout
        if self.status is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self.status = int(self._server.stdout.readline())
        return self.status

    def wait(self, timeout: float) -> int:
        """Wait for the end; after `timeout` seconds, kill the command and raise `TimeoutError`."""
        if (status := self.poll(timeout)) is not None:
            return status
        os.kill(self.pid, signal.SIGKILL)
        self.poll(60)
        raise TimeoutError(f"not ended after {timeout} s")


def run(
    command: Sequence[str], environment: dict[str, str], cwd: Path = ROOT, stdin: str = "", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND…` to its end, as `subprocess.run` does."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / stream for stream in ("in", "out", "err")]
        paths[0].write_text(stdin)
        status = Fork(command, environment, cwd, [str(path) for path in paths]).wait(timeout)
        return subprocess.CompletedProcess(list(command), status, paths[1].read_text(), paths[2].read_text())


@functools.cache
def _server(number: int) -> subprocess.Popen[bytes]:
    """A server of this test process; it ends when its standard input is closed."""
    # numpy's OpenBLAS would start threads on import, and a fork has only one thread.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


def _serve() -> dict[str, Any] | None:
    """Fork for each request, one after another: returns the request in each fork, and None in the server at the end."""
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork keeps only one thread"
        pid = os.fork()
        if not pid:
            request: dict[str, Any] = json.loads(line)
            return request
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run a command in this process, as `python COMMAND…` does."""
    for number, (path, flags) in enumerate(
        zip(request["streams"], (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    # The old object holds what Python has read ahead of the requests.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["command"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec", dont_inherit=True), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    if (request := _serve()) is not None:
        _become(request)
