"""The command as a user gives it, on the CPU through XLA; and its process where it dies, hangs or waits for another host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain_xla.cli import main
from pretrain_xla.doctor.client import ask
from pretrain_xla.doctor.worker import Recorder, examine_devices
from pretrain_xla.preflight.calibration import read_calibration
from tests import forks
from tests.end_to_end.conftest import environment
from tests.servers import free_port

DEVICES = {
    "job": "devices",
    "parallel": {"runtime": "torch", "device": "cpu", "host_timeout": 5.0},
    "chip": None,
    "host_seconds": 0.5,
    "facts": {"versions": {}, "failed": []},
}
TINY = (
    "--vocab-size 61 --seq-length 16 --d-model 32 --num-layers 2 --num-heads 2 --d-ff 32 --train-batch-size 4".split()
)


def test_this_machine(tmp_path: Path) -> None:
    """Everything that a CPU can show, in one run: the collectives over 4 devices, the kernels, the steps beside an estimate."""
    flags = ["--storage-mib", "1", "--steps", "15", "--topology", "v5e-1", "--json", *TINY]
    done = forks.run(
        ["-m", "pretrain_xla", "doctor", *flags], environment(PJRT_DEVICE="CPU"), cwd=tmp_path, timeout=550
    )
    assert done.stdout, done.stderr[-2000:]
    tree = json.loads(done.stdout)
    checks = {check["name"]: check for check in tree["checks"]}
    wrong = {name: check["found"] for name, check in checks.items() if check["status"] != "ok"}
    assert wrong.keys() <= {"storage ."}, wrong  # a disk may be slow
    assert done.returncode == bool(wrong)
    assert checks["devices"]["figures"]["count"] == 4
    assert "interpreted" in checks["kernels"]["found"]
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert checks[kind]["figures"]["devices"] == 4
    steps = checks["15 steps"]["figures"]
    assert len(steps["losses"]) == 15
    assert steps["step_seconds"] > 0 < steps["compile_seconds"]
    assert steps["estimate"]["ratio"] == pytest.approx(steps["step_seconds"] / steps["estimate"]["seconds"])
    assert "v5e-1 by preflight" in checks["15 steps"]["expected"]
    made = read_calibration(tmp_path / "calibration", "cpu")
    assert made is not None
    assert made.step is not None
    assert made.step.ratio is None, "a CPU's time says nothing about the estimate for a TPU"
    assert tree["calibration"] == "calibration/cpu.json"


def test_the_torch_runtime_in_this_process(tmp_path: Path) -> None:
    examine_devices(DEVICES, Recorder(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["start", "hosts", "devices", "kernels", "matmul", "stream"]
    figures = {row["stage"]: row["figures"] for row in rows}
    assert figures["matmul"]["errors"] == figures["stream"]["errors"] == [0.0]
    assert figures["matmul"]["rate"] > 0 < figures["stream"]["rate"]


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    answer = ask(DEVICES, 300)
    assert answer.figures == {"start": {}}
    assert "process 1 of 2 did not come to the start" in answer.errors["hosts"]


def test_a_process_that_dies_and_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os\nprint('undefined symbol', flush=True)\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    died = ask(DEVICES, 300)
    assert died.broken == ("start", "the process ended with status -6: undefined symbol")
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(1000)\n")
    hung = ask(DEVICES, 3.0)
    assert hung.broken is not None
    assert "nothing came for 3 s" in hung.broken[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 5", "--steps 5: at least 15"),
        ("--storage-mib 0", "--storage-mib 0: at least 1"),
        ("--timeout 0", "--timeout 0: must be positive"),
        ("--stepz 3", "'--stepz'"),
        ("--topology v9x-8", "topology='v9x-8': unknown TPU"),
    ],
)
def test_a_wrong_request_is_one_line(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *flags.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    assert "--storage URL" in capsys.readouterr().out
