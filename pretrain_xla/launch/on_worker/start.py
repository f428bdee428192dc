"""Starts the run on this worker, detached from the connection: start.py NAME

Standard input is JSON:

- `environment`: variables of the run, with its secrets, which are kept nowhere else; `arguments`: of the training command.
- `delete`, `grace`, `deadline`, for the case that nobody looks after the slice any more: `grace` seconds after the end of the
  run, this worker deletes the slice by that call of gcloud. A run that is there at the deadline is stopped.

Prints `started`, or `running` if the run is there already. The run is kept by a process of a session of its own, which holds
`NAME/run.lock` while the run lives, appends the output to `NAME/run.log`, and writes the exit status to `NAME/exit`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback


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
        try:
            _keep(base, given, begins)
            os.close(lock)
            _delete(base, given)
        except BaseException:
            traceback.print_exc()  # to the log
        finally:
            os._exit(1)
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
    deadline = given.get("deadline")
    try:
        status = process.wait(None if deadline is None else max(float(str(deadline)) - time.time(), 1.0))
    except subprocess.TimeoutExpired:
        print("the budget is spent, and nobody has stopped this run: it stops by itself", file=sys.stderr, flush=True)
        process.terminate()
        status = process.wait()
    _write(base, "exit", str(status if status >= 0 else 128 - status))


def _delete(base: str, given: dict[str, object]) -> None:
    """If nobody has done so within the grace, nor started the run again, delete the slice from here, as far as it may."""
    call, grace = given.get("delete"), given.get("grace")
    if not isinstance(call, list) or grace is None:
        return
    time.sleep(float(str(grace)))
    if not os.path.exists(os.path.join(base, "exit")):
        return
    print(f"nobody has looked after this slice for {grace} s: it is deleted from here", file=sys.stderr, flush=True)
    program = shutil.which("gcloud")
    if program is None:
        print("gcloud is not on this machine: the slice must be deleted by hand", file=sys.stderr, flush=True)
        return
    subprocess.run([program, *call], check=False)


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
