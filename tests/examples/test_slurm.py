"""The Slurm script under bash, with a small stand-in for `srun` and `scontrol` in front of PATH."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..end_to_end.conftest import ROOT, environment, metrics, run
from ..faults.conftest import free_port

SRUN = """#!/bin/bash
# Start the command once for each node, pass SIGUSR1 on to these processes alone, and end with the highest status, as srun does.
while [[ $1 == -* ]]; do shift; done
pids=() highest=0 hit=0
trap 'hit=1; kill -USR1 "${pids[@]}" 2>/dev/null' USR1
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do
    while :; do hit=0; wait "$pid"; status=$?; ((hit)) || break; done
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
    *) exit 1 ;;
esac
"""


class Job:
    """A job's script, its output and what was requeued."""

    def __init__(self, folder: Path, nodes: int, **programs: str) -> None:
        self.run = folder / "run"
        self._requeued, self._output = folder / "requeued", folder / "slurm.out"
        (folder / "bin").mkdir()
        for name, text in programs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = environment(
            PATH=path,
            RUN=str(self.run),
            VENV="/none",
            PORT=str(free_port()),
            REQUEUED=str(self._requeued),
            SLURM_JOB_ID="7",
            SLURM_JOB_NODELIST="localhost",
            SLURM_JOB_NUM_NODES=str(nodes),
            OMP_NUM_THREADS="1",
        )
        self._started = 0

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Run the script, as Slurm does after `sbatch` and after each `scontrol requeue`."""
        with open(self._output, "ab") as output:
            process = subprocess.Popen(
                ["bash", "examples/slurm/train.sbatch", *arguments],
                cwd=ROOT,
                env=self._environment | {"SLURM_RESTART_COUNT": str(self._started)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started += 1
        return process

    @property
    def requeued(self) -> int:
        return len(self._requeued.read_text().splitlines()) if self._requeued.exists() else 0

    @property
    def output(self) -> str:
        return self._output.read_text()


def test_at_the_time_limit_it_saves_is_requeued_and_goes_on(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    changes = {"train_steps": 3000, "decay_steps": 3000, "save_interval": 10_000, "valid_interval": 10_000}
    changes |= {"log_interval": 1, "seq_length": 8, "valid_steps": 1}
    command = [*flags(tmp_path / "run", **changes), "--device", "cpu"]
    job = Job(tmp_path, 2, srun=SRUN, scontrol=SCONTROL)
    process = job.start(*command)
    try:
        deadline = time.monotonic() + 240
        while len(re.findall(r"^step +\d+/", job.output, re.MULTILINE)) < 5:
            assert time.monotonic() < deadline, job.output
            assert process.poll() is None, job.output
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 128 + signal.SIGUSR1, job.output
    finally:
        process.kill()
    assert job.requeued == 1
    stopped = re.findall(r"stopped at step (\d+); the same command continues from there", job.output)
    assert len(stopped) == 1, job.output
    assert "status 138: the time is up; requeued" in job.output

    last = str(int(stopped[0]) + 10)
    assert job.start(*command, "--train-steps", last).wait(240) == 0, job.output
    assert job.requeued == 1
    assert f"continuing from {job.run}/checkpoints/step_{int(stopped[0]):08d}" in job.output

    undisturbed = run("run_pretrain.py", *command, "--run-dir", str(tmp_path / "undisturbed"), "--train-steps", last)
    assert undisturbed.status == 0, undisturbed.errors
    expected = [(row["step"], row["loss"]) for row in metrics(tmp_path / "undisturbed") if "loss" in row]
    found = [(row["step"], row["loss"]) for row in metrics(job.run) if "loss" in row]
    assert [step for step, _ in found] == list(range(1, int(last) + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("status", "requeued", "line"),
    [
        (0, 0, "done"),
        (2, 0, "an error to be fixed, or a request to stop; not requeued"),
        (143, 0, "an error to be fixed, or a request to stop; not requeued"),
        (75, 1, "it can go on from the start; requeued"),
        (137, 1, "it can go on from the start; requeued"),
    ],
)
def test_what_is_requeued(status: int, requeued: int, line: str, tmp_path: Path) -> None:
    job = Job(tmp_path, 1, srun=f"#!/bin/bash\nexit {status}\n", scontrol=SCONTROL)
    assert job.start().wait(20) == status
    assert job.requeued == requeued
    assert line in job.output


def test_one_that_fails_again_without_a_new_checkpoint_is_not_requeued(tmp_path: Path) -> None:
    saves = """#!/bin/bash
folder=$RUN/checkpoints/step_0000000$SLURM_RESTART_COUNT
((SLURM_RESTART_COUNT < 3)) && mkdir -p "$folder" && touch "$folder/checkpoint.json"
exit 75
"""
    job = Job(tmp_path, 1, srun=saves, scontrol=SCONTROL)
    for restarts in range(4):
        assert job.start().wait(20) == 75
        assert job.requeued == min(restarts + 1, 3)
    assert "no new checkpoint since the failure before; not requeued" in job.output


def test_its_options_are_those_that_it_rests_on() -> None:
    text = (ROOT / "examples" / "slurm" / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"] == "B:USR1@300"  # without B:, Slurm would signal all but the script
    assert options["ntasks-per-node"] == "1"
    assert options.keys() >= {"requeue", "open-mode", "nodes", "gpus-per-node", "time"}
    assert shutil.which("bash")
    subprocess.run(["bash", "-n", ROOT / "examples" / "slurm" / "train.sbatch"], check=True)
