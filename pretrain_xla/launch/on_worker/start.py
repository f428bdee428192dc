"""Starts the run on this worker, detached from the connection: start.py NAME

Standard input is JSON: `environment`, variables of the run, with its secrets, which are kept nowhere else; `arguments`, of the
training command. Prints `started`, or `running` if the run is there already. The run is kept by a process of a session of its
own, which holds `NAME/run.lock` as long as it lives, appends the output to `NAME/run.log`, and writes the status to
`NAME/exit`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys


def main(name: str) -> None:
    """The command line."""
    base = os.path.abspath(name)
    lock = os.open(os.path.join(base, "run.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("running")
        return
    given = json.load(sys.stdin)
    for old in ("exit", "pid"):
        if os.path.exists(path := os.path.join(base, old)):
            os.unlink(path)
    begun, begins = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(begun)
        _keep(base, given, begins)
        os._exit(0)
    os.close(begins)
    if os.read(begun, 1) != b"1":  # the keeper ended without starting the run
        raise SystemExit("the run could not be started: see its log")
    print("started")


def _keep(base: str, given: dict[str, object], begins: int) -> None:
    """Run to the end. The lock is held by the descriptor that this process has inherited."""
    log = os.open(os.path.join(base, "run.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # stop.py asks the supervisor, whose end is then recorded
    environment, arguments = given["environment"], given["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    python = os.path.join(base, "venv", "bin", "python")
    own = {"PYTHONUNBUFFERED": "1", "PJRT_DEVICE": os.environ.get("PJRT_DEVICE", "TPU")}
    process = subprocess.Popen(
        [python, "-m", "pretrain_xla", "supervise", "--", python, "run_pretrain_xla.py", *arguments],
        cwd=os.path.join(base, "code"),
        env={**os.environ, **own, **environment},
        preexec_fn=_as_usual,
    )
    _write(base, "pid", str(process.pid))
    os.write(begins, b"1")
    os.close(begins)
    status = process.wait()
    _write(base, "exit", str(status if status >= 0 else 128 - status))


def _as_usual() -> None:
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _write(base: str, name: str, text: str) -> None:
    path = os.path.join(base, name)
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main(sys.argv[1])
