"""SIGKILLs at random moments: `python benchmarks/kills.py`, 20 of a run on each of three ways to run; about 20 minutes.

A small run is started, killed, and started again by the same command, until it has made all of its steps; then its metrics must
be, bit for bit, those of a run that nobody disturbed. The next run follows, until all kills are spent. Most kills come a random
number of steps and milliseconds after the first step of a life, some while it starts. A checkpoint is due every three steps, so
many of them come while one is being written behind the training, or an older one removed. If a run has several processes, one
of them is killed, and the others must end by themselves with the status that says so; during the start all are killed.

Each life is a fork of this process, which has imported torch, so that it begins in a fraction of a second. The ways to run:

* `xla`: one process of torch_xla with SPMD over four virtual devices;
* `ddp`: two processes of torch DDP;
* `pod`: a pod in small, two processes of torch_xla that agree as hosts do, each with the whole step on its own device;
* `torch`: one process of torch, the cheapest, for a soak: `--ways torch --kills 1000 --folder F --seconds 600`, as often as
  needed: what is in the folder is continued.

A run that does not resume, does not end, or has other metrics ends the program; its folder stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Forks have one thread, and several processes share few cores.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.forks import LIBRARIES  # noqa: E402

SILENCE = 10
"""--host-timeout: seconds until a killed process is missed."""
ENDS = 60.0
"""Seconds in which the others must have ended."""
LASTS = 900.0
"""Seconds without a step after which a life counts as hanging."""
LIFE = 14
"""Steps after which a life is killed at the latest."""
EARLY = 0.2
"""Share of the kills that come before the first step of a life."""
AFTER = 0.05
"""A kill comes up to so many seconds after a step."""
SAME = ("step", "loss", "grad_norm", "learning_rate", "valid_loss")
QUICK = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "PJRT_DEVICE": "CPU",
}
# Everything that the next step depends on: two optimizers with all their state, dropout, accumulation, several epochs.
FLAGS = """--vocab-size 200 --seq-length 16 --d-model 16 --num-layers 1 --num-heads 2 --d-ff 32 --dropout 0.1 --optim-type muon
--muon-momentum-warmup 15 --train-batch-size 4 --gradient-accum-step 2 --eval-batch-size 4 --valid-steps 2 --valid-interval 20
--save-interval 3 --log-interval 1 --warmup-steps 4 --max-grad-norm 1.0 --strict-graph --no-tensorboard"""


@dataclass(frozen=True)
class Way:
    """A way to run: runtime, number of processes, environment."""

    runtime: str
    processes: int
    environment: dict[str, str]


WAYS = {
    "xla": Way("xla", 1, QUICK | {"CPU_NUM_DEVICES": "4"}),
    "ddp": Way("torch", 2, {}),
    "pod": Way("xla", 2, QUICK | {"CPU_NUM_DEVICES": "1"}),
    "torch": Way("torch", 1, {}),
}


class Life:
    """The processes of a run from a start to their end."""

    def __init__(self, way: Way, flags: list[str], output: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._outputs = [output.with_suffix(f".{index}") for index in range(way.processes)]
        self.began, self._said = time.monotonic(), ""
        self._pids = [_fork(way, flags, path, _variables(way, n, port)) for n, path in enumerate(self._outputs)]
        self.statuses: dict[int, int] = {}

    def ended(self) -> bool:
        """Whether all processes have ended."""
        for index, pid in enumerate(self._pids):
            if index not in self.statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.statuses[index] = os.waitstatus_to_exitcode(found[1])
        return len(self.statuses) == len(self._pids)

    @property
    def steps(self) -> int:
        """Steps that it has printed so far."""
        return len(re.findall(r"^step +\d+/", self.said(0), re.MULTILINE))

    def said(self, index: int) -> str:
        """What a process has printed."""
        with contextlib.suppress(FileNotFoundError):
            return self._outputs[index].read_text(errors="replace")
        return ""

    def kill(self, index: int | None = None) -> bool:
        """Kill one process, or all; returns whether one still ran."""
        self.ended()
        chosen = [n for n in range(len(self._pids)) if n not in self.statuses and index in (n, None)]
        for number in chosen:
            os.kill(self._pids[number], signal.SIGKILL)
        return bool(chosen)

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; returns whether they did."""
        limit = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > limit:
                return False
            time.sleep(0.002)
        return True


def _variables(way: Way, index: int, port: str) -> dict[str, str]:
    if way.processes == 1:
        return way.environment
    if way.runtime == "xla":
        return way.environment | {"PRETRAIN_XLA_REHEARSAL": f"{index}/{way.processes}@127.0.0.1:{port}"}
    size, rank = str(way.processes), str(index)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return way.environment | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _fork(way: Way, flags: list[str], output: Path, variables: dict[str, str]) -> int:
    """Start `run_pretrain.py` or `run_pretrain_xla.py` in a fork; returns its pid."""
    parent = os.getpid()
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this program
        if os.getppid() == parent:
            opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
            os.environ.update(variables)
            sys.argv = ["run_pretrain.py", *flags]
            importlib.import_module("pretrain_xla.cli").run_pretrain(way.runtime)
            status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


class Kills:
    """Runs of one way that are killed; the figures are kept in a file, so that they can be continued.

    Args:
        way: key of `WAYS`.
        folder: where everything is written.
        steps: of each run.
        seed: of the moments.
    """

    def __init__(self, way: str, folder: Path, steps: int, seed: int) -> None:
        self._name, self._way, self._folder, self._seed = way, WAYS[way], folder / way, seed
        data = folder / "data"
        flags = f"--train-dir {data}/train --valid-dir {data}/valid --train-steps {steps} --decay-steps {steps} {FLAGS}"
        self._flags = [*flags.split(), *(("--host-timeout", str(SILENCE)) if self._way.processes > 1 else ())]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state = self._folder / "figures.json"
        self.figures: Counter[str] = Counter()
        self._expected, self._starts_within = self._undisturbed()
        if self._state.exists():
            self.figures.update(json.loads(self._state.read_text()))

    def _start(self, run: Path) -> Life:
        return Life(self._way, [*self._flags, "--run-dir", str(run)], self._folder / "output")

    def _undisturbed(self) -> tuple[list[Any], float]:
        """The records of a run that nobody disturbs, and the seconds until its first step."""
        run, about = self._folder / "undisturbed", self._folder / "undisturbed.json"
        if not about.exists():
            shutil.rmtree(run, ignore_errors=True)
            life = self._start(run)
            self._lasts(life, 1)
            seconds = time.monotonic() - life.began
            self._ends(life, {0})
            about.write_text(json.dumps([records(run), seconds]))
        expected, seconds = json.loads(about.read_text())
        return expected, seconds

    def kill(self, count: int, seconds: float) -> None:
        """Go on until there were `count` kills and the last run is complete, or the time is over.

        Raises:
            AssertionError: a run did not resume, did not end, or has other metrics.
        """
        limit, run = time.monotonic() + seconds, self._folder / "run"
        while time.monotonic() < limit and (self.figures["kills"] < count or run.exists()):
            if not self._live(run, kills=self.figures["kills"] < count):
                continue
            assert records(run) == self._expected, f"{run}: other metrics than in {self._folder}/undisturbed"
            graphs = json.loads((run / "summary.json").read_text()).get("graphs", {})
            assert all(count <= 1 for count in graphs.values()), f"{run}: compiled again after a resume: {graphs}"
            shutil.rmtree(run)
            self.figures["runs complete and equal"] += 1
            self._keep()
        self._keep()

    def _live(self, run: Path, *, kills: bool) -> bool:
        """One life; returns whether the run is complete."""
        random = np.random.default_rng([self._seed, self.figures["lives"]])
        self.figures["lives"] += 1
        life = self._start(run)
        if not kills:
            life.wait(LASTS)
            return self._is_over(life)
        early, victim = random.random() < EARLY, int(random.integers(self._way.processes))
        if early:
            life.wait(random.uniform(0, self._starts_within))
        else:
            self._lasts(life, int(random.integers(1, LIFE + 1)))
            life.wait(random.uniform(0, AFTER))
        if not life.kill(None if early else victim):  # it was quicker
            return self._is_over(life)
        began = time.monotonic()
        self._ends(life, {75, 0, -signal.SIGKILL})
        if self._way.processes > 1:
            self._most("longest wait of the others, ms", round(1000 * (time.monotonic() - began)))
        self._count(run, life, early)
        self._keep()
        return False

    def _is_over(self, life: Life) -> bool:
        """Whether a life that ended by itself has completed the run. On a busy machine one process may miss the other."""
        self._ends(life, {0, 75} if self._way.processes > 1 else {0})
        self.figures["resumes"] += "continuing from" in life.said(0)
        self.figures["lives that missed a live process"] += (missed := 75 in life.statuses.values())
        return not missed

    def _count(self, run: Path, life: Life, early: bool) -> None:
        logged = max((row[0] for row in records(run)), default=0)
        complete, incomplete = checkpoints(run)
        newest = max(complete, default=0)
        self.figures["kills"] += 1
        self.figures["kills before the first step"] += early
        self.figures["kills during a save"] += any(step > newest for step in incomplete)
        self.figures["kills during a removal"] += any(step < newest for step in incomplete)
        self.figures["resumes"] += "continuing from" in life.said(0)
        self.figures["lost steps"] += (lost := max(logged - newest, 0))
        self._most("most lost steps", lost)
        if self.figures["kills"] % 10 == 0:
            print(f"{self._name}: {self.figures['kills']:,} kills", file=sys.stderr, flush=True)

    def _most(self, what: str, value: int) -> None:
        self.figures[what] = max(self.figures[what], value)

    def _lasts(self, life: Life, steps: int) -> None:
        """Wait until a life has made some steps, or has ended."""
        limit = time.monotonic() + LASTS
        while life.steps < steps and not life.ended():
            if time.monotonic() > limit:
                life.kill()
                raise AssertionError(f"{self._name}: hangs: {life.said(0)[-500:]}")
            time.sleep(0.002)

    def _ends(self, life: Life, statuses: set[int]) -> None:
        """Wait until all have ended, with one of the statuses."""
        if not (ended := life.wait(ENDS if 75 in statuses else LASTS)):
            life.kill()
            life.wait(ENDS)
        said = " | ".join(life.said(index)[-500:] for index in range(self._way.processes))
        assert ended, f"{self._name}: did not end: {said}"
        assert set(life.statuses.values()) <= statuses, f"{self._name}: ended with {life.statuses}: {said}"

    def _keep(self) -> None:
        partial = self._state.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures))
        partial.replace(self._state)


def records(run: Path) -> list[list[Any]]:
    """What a run has logged. A line that was being written is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [[row.get(key) for key in SAME] for row in (json.loads(line) for line in lines if line.endswith("\n"))]
    return []


def checkpoints(run: Path) -> tuple[list[int], list[int]]:
    """Steps of the complete checkpoints, and of the others."""
    found: tuple[list[int], list[int]] = ([], [])
    for folder in (run / "checkpoints").glob("step_*"):
        found[not (folder / "checkpoint.json").exists()].append(int(folder.name[5:]))
    return found


def write_tokens(folder: Path) -> None:
    """Random walks over the vocabulary, which can be learnt."""
    random = np.random.default_rng(0)
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        walk = np.cumsum(random.integers(0, 3, 10_000)) % 200
        np.save(folder / split / "000.npy", walk.astype(np.uint16))


@contextlib.contextmanager
def folder_of(name: str | None) -> Iterator[Path]:
    """The named folder, or a temporary one, which stays if something goes wrong."""
    folder = Path(name or tempfile.mkdtemp(prefix="kills"))
    yield folder
    if name is None:
        shutil.rmtree(folder)


def main() -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each way to run")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["xla", "ddp", "pod"])
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="what is there is continued; default: a temporary one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be continued")
    flags = parser.parse_args()
    package = ("pretrain_xla.cli", "pretrain_xla.train.trainer", "matplotlib.pyplot", "torch.distributed.checkpoint")
    for library in (*(LIBRARIES if any(WAYS[way].runtime == "xla" for way in flags.ways) else ()), *package):
        importlib.import_module(library)
    # A fork keeps only one thread. pyarrow's memory allocator has another, and makes forks safe by itself.
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
    assert len(threads) == 1, f"a fork would lose threads: {threads}"
    with folder_of(flags.folder) as folder:
        if not (folder / "data" / "valid" / "000.npy").exists():
            write_tokens(folder / "data")
        for way in flags.ways:
            began, kills = time.monotonic(), Kills(way, folder, flags.steps, flags.seed)
            try:
                kills.kill(flags.kills, flags.seconds)
            except AssertionError as error:
                print(f"{way}: {error}\n{folder} is left as it is", file=sys.stderr)
                return 1
            print(json.dumps({"way": way, **kills.figures, "seconds": round(time.monotonic() - began)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
