"""The supervisor, with real processes: it starts a run again or not, by how the run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain_xla import supervise as module
from pretrain_xla.errors import UserError
from pretrain_xla.supervise import supervise_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(module, "GRACE", 0.5)


def starts(tmp_path: Path, statement: str, *flags: str) -> tuple[int, int]:
    """(exit status of the supervisor, starts of the command); in the statement, $n is the number of the start."""
    log = tmp_path / "starts"
    script = f"echo x >> {log}; n=$(wc -l < {log}); {statement}"
    status = supervise_command([*flags, "--", "sh", "-c", script])
    return status, len(log.read_text().splitlines())


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("exit 0", (0, 1)),
        ("test $n = 3 || exit 75", (0, 3)),  # it hung
        ("test $n = 2 || exit 1", (0, 2)),  # a bug
        ("test $n = 2 || kill -KILL $$", (0, 2)),  # out of memory
        ("exit 2", (2, 1)),  # a wrong flag
        ("exit 143", (143, 1)),  # it was asked to stop, and saved
        ("kill -TERM $$; sleep 9", (143, 1)),
    ],
)
def test_by_how_it_ended(statement: str, expected: tuple[int, int], tmp_path: Path) -> None:
    assert starts(tmp_path, statement) == expected


def test_a_crash_loop_ends_with_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert starts(tmp_path, "echo 'ValueError: bad s3://A:SECRET@b/c' >&2; exit 1", "--max-restarts", "3") == (1, 4)
    *_, last = capfd.readouterr().err.splitlines()
    expected = r"supervise: gave up after 3 restarts without progress; the last: status 1 after 0 s: "
    assert last == expected + "ValueError: bad s3://***@b/c"


def test_a_long_run_is_no_crash_loop_and_its_fixable_errors_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEALTHY_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIXABLE_SECONDS", 0.0)
    assert starts(tmp_path, "test $n = 6 || { echo step $n >&2; exit 2; }", "--max-restarts", "1") == (0, 6)


def test_a_long_run_that_ends_always_with_the_same_error_is_a_crash_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEALTHY_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIXABLE_SECONDS", 0.0)
    (first := tmp_path / "a").mkdir()
    assert starts(first, "echo 'error: NaN from step 7 on' >&2; exit 2") == (2, 2)
    assert starts(tmp_path, "echo 'ValueError: 7' >&2; exit 1", "--max-restarts", "3") == (1, 4)


def test_what_a_run_leaves_behind_is_ended(tmp_path: Path) -> None:
    left = f"(trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; wait; sleep 60) & sleep 0.3; exit 1"
    assert starts(tmp_path, left, "--max-restarts", "0") == (1, 1)
    pid = int((tmp_path / "pid").read_text())
    limit = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_missing_command_is_one_line() -> None:
    for arguments, expected in (([], "name the command"), (["--", "/no/such"], "cannot be started: No such file")):
        with pytest.raises(UserError, match=expected):
            supervise_command(arguments)


_SAVES = "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_the_run_ends_with_the_supervisor(how: str, tmp_path: Path) -> None:
    """A signal is passed on, and the run saves; also if the supervisor is killed."""
    command = [sys.executable, "-m", "pretrain_xla", "supervise", "--", "sh", "-c", _SAVES]
    supervisor = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == "up\n"
    os.kill(supervisor.pid, signal.SIGTERM if how == "asked" else signal.SIGKILL)
    assert supervisor.stdout.readline() == "saved\n"
    assert supervisor.wait(20) == (143 if how == "asked" else -signal.SIGKILL)
