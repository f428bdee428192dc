"""What runs on a worker, under bash and a Python of its own: set-up, start, follow, stop, stacks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.launch.calls import on_worker, unpack

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "pretrain_xla" / "launch" / "on_worker"
# Takes the place of a training, under the real supervisor: it says what it was given, and saves when it is asked to stop.
RUN = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGUSR2, file=2)
def save(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("arguments", sys.argv[1:], os.environ["PJRT_DEVICE"], len(os.environ["KEY"]), flush=True)
os.makedirs("../run", exist_ok=True)
with open("../run/metrics.jsonl", "w") as file:
    print('{"step": 3, "loss": 2.5}', '{"step": 3, "valid_loss": 1.0}', '{"step": 4, "lo', sep="\\n", end="", file=file)
if "--quick" in sys.argv:
    sys.exit(2)
while "--deaf" in sys.argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(0.1)
while True:
    time.sleep(0.1)
"""


class Worker:
    """A folder that is a worker's home, with the programs in place."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base = home / "mine"
        code = self.base / "code"
        code.mkdir(parents=True)
        (code / "pretrain_xla").symlink_to(ROOT / "pretrain_xla")
        (code / "run_pretrain_xla.py").write_text(RUN)
        (code / "requirements.txt").write_text("numpy>=2.0   # why\n")
        (code / "requirements-xla_tpu.txt").write_text(
            "-r requirements.txt\ntorch==2.9.0\ntorch_xla[tpu,pallas]==2.9.0\n"
        )
        (home / "bin").mkdir()

    def python(self) -> None:
        """An environment that fits: the one that runs this test."""
        (self.base / "venv" / "bin").mkdir(parents=True)
        program = self.base / "venv" / "bin" / "python"
        program.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)

    def bash(self, command: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[bytes]:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        environment = {"HOME": str(self.home), "PATH": f"{self.home}/bin:/usr/bin:/bin", "PJRT_DEVICE": "CPU"}
        return subprocess.run(
            ["bash", "-c", command], input=given, capture_output=True, cwd=self.home, env=environment, timeout=60
        )

    def call(self, *words: str, stdin: str = "", program: str | None = None) -> str:
        done = self.bash(on_worker("mine", *words, program=program), stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def start(self, *arguments: str, **more: Any) -> str:
        given = {"environment": {"KEY": "s3cr3t-value"}, "arguments": [*arguments], **more}
        return self.call("start.py", stdin=json.dumps(given)).strip()

    def follow(self, offset: int = 0, seconds: float = 0.0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.call("follow.py", str(offset), str(seconds), "0.2").splitlines()]

    def wait_for_log(self, text: str) -> None:
        limit = time.monotonic() + 30
        while text not in (log := (self.base / "run.log").read_text() if (self.base / "run.log").exists() else ""):
            assert time.monotonic() < limit, log
            time.sleep(0.05)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    yield made
    if (made.base / "venv").exists():
        made.bash(on_worker("mine", "stop.py", "0.1"))


def test_a_run_is_started_followed_and_stopped(worker: Worker) -> None:
    worker.python()
    assert worker.start("--steps", "9") == "started"
    assert worker.call("start.py") == "running\n", "also without its input, which a dropped connection has taken"
    worker.wait_for_log("arguments")
    log, status = worker.follow()
    assert log == {"log": "arguments ['--steps', '9'] CPU 12\n", "begin": 0, "offset": log["offset"]}
    assert status["status"] == {"running": True, "exit": None, "row": {"step": 3, "loss": 2.5}}
    assert [*worker.follow(offset=log["offset"])[0]] == ["status"]
    # The code is not taken away under it, nor its packages.
    assert worker.bash(unpack("mine"), b"no archive").returncode == 0
    assert (worker.base / "code" / "run_pretrain_xla.py").exists()
    refused = worker.bash(on_worker("mine", "setup.sh", program="bash"), "numpy==0.1\n# end\n")
    assert b"numpy is" in refused.stderr
    assert b"a run is going on here" in refused.stderr
    # Its secrets are in no command line and no file.
    told = worker.call("stacks.py")
    assert "run_pretrain_xla.py --steps 9" in told
    assert "Current thread" in told, "the stack of its threads"
    files = [path.read_bytes() for path in worker.home.rglob("*") if path.is_file()]
    assert not any(b"s3cr3t-value" in content for content in [*files, told.encode()])
    assert worker.call("stop.py", "20") == "stopped\n"
    assert worker.follow()[-1]["status"] == {"running": False, "exit": 143, "row": {"step": 3, "loss": 2.5}}
    assert "saved\n" in (worker.base / "run.log").read_text()
    assert worker.call("stop.py", "20") == "not running\n"


def test_a_run_that_does_not_stop_is_killed_and_one_that_ends_is_told(worker: Worker) -> None:
    worker.python()
    worker.start("--deaf")
    worker.wait_for_log("arguments")
    assert worker.call("stop.py", "0.3") == "killed: it had not stopped within 0 s\n"
    assert worker.follow()[-1]["status"]["exit"] is None, "nobody knows how it ended"
    assert worker.start("--quick") == "started"
    followed = worker.follow(seconds=20)
    assert followed[-1]["status"]["exit"] == 2
    # One that cannot be started says so.
    (worker.base / "venv" / "bin" / "python").unlink()
    given = json.dumps({"environment": {}, "arguments": []})
    done = worker.bash(on_worker("mine", "start.py", program=sys.executable), given)
    assert (done.returncode, done.stderr) == (1, b"the run could not be started: see its log\n")
    assert "FileNotFoundError" in (worker.base / "run.log").read_text()


def test_a_slice_that_nobody_looks_after_is_deleted(worker: Worker) -> None:
    worker.python()
    (worker.home / "bin" / "gcloud").write_text('#!/bin/bash\necho "$@" > "$HOME/called"\n')
    (worker.home / "bin" / "gcloud").chmod(0o755)
    worker.start(delete=["delete", "mine"], grace=0.2, deadline=time.time() + 1)
    limit = time.monotonic() + 30
    while not (worker.home / "called").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert (worker.home / "called").read_text() == "delete mine\n"
    log = (worker.base / "run.log").read_text()
    assert "the budget is spent" in log
    # A run that was started again is left alone.
    (worker.home / "called").unlink()
    worker.start("--quick", delete=["delete", "mine"], grace=1.5)
    worker.follow(seconds=20)
    worker.start()
    time.sleep(2.0)
    assert not (worker.home / "called").exists()


UV = """#!/bin/bash
echo "$@" >> "$HOME/uv.log"
if [ "$1" = venv ]; then
    mkdir -p "${@: -1}/bin"
    printf '#!/bin/bash\\nexec %s "$@"\\n' PYTHON > "${@: -1}/bin/python"
    chmod +x "${@: -1}/bin/python"
fi
if [ "$1" = pip ] && [ -e "$HOME/fails" ]; then rm "$HOME/fails"; exit 1; fi
exit 0
"""


def test_the_environment_is_made_once_and_alike(worker: Worker) -> None:
    (worker.home / "bin" / "uv").write_text(UV.replace("PYTHON", sys.executable))
    (worker.home / "bin" / "uv").chmod(0o755)
    (worker.home / "bin" / "sleep").symlink_to("/bin/true")
    (worker.base / "venv" / "bin").mkdir(parents=True)  # left by a set-up that was interrupted
    (worker.home / "fails").touch()  # the network does, once
    printed = worker.call("setup.sh", "numpy", stdin="# end\n", program="bash")
    versions = json.loads(printed.splitlines()[-1])
    assert versions["torch"].startswith("2.9.0")
    assert versions["python"] == ".".join(map(str, sys.version_info[:2]))
    assert "pretrain-xla" not in versions
    log = (worker.home / "uv.log").read_text().splitlines()
    install = f"pip install --quiet --python {worker.base}/venv/bin/python --torch-backend=cpu -r {worker.base}"
    assert log == [
        f"venv --quiet --python 3.11 {worker.base}/venv",
        *2 * [f"{install}/code/requirements-xla_tpu.txt numpy"],
    ]
    # The second worker installs exactly what the first has; where it is there already, nothing.
    exact = f"numpy=={versions['numpy']}\n"
    assert json.loads(worker.call("setup.sh", stdin=f"{exact}# end\n", program="bash")) == versions
    assert len((worker.home / "uv.log").read_text().splitlines()) == 3
    done = worker.bash(on_worker("mine", "setup.sh", program="bash"), "numpy==0.1\n# end\n")
    assert done.returncode == 1, "what was installed is not what was wanted"
    assert f"numpy is {versions['numpy']}, and not 0.1" in done.stderr.decode()
    assert (worker.home / "uv.log").read_text().splitlines()[-1] == f"{install}/wanted.txt"
    done = worker.bash(on_worker("mine", "setup.sh", program="bash"), "numpy==0.")
    assert b"the list of versions did not arrive whole" in done.stderr


def test_code_arrives_whole_or_not_at_all(worker: Worker) -> None:
    packed = subprocess.run(["tar", "-cz", "-C", str(PROGRAMS), "start.py"], capture_output=True, check=True).stdout
    done = worker.bash(unpack("mine"), packed[: len(packed) // 2])
    assert done.returncode != 0
    assert (worker.base / "code" / "run_pretrain_xla.py").exists()
    assert worker.bash(unpack("mine"), packed).returncode == 0
    assert [path.name for path in (worker.base / "code").iterdir()] == ["start.py"]
