"""`--stop-after`, in real runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.config.duration import seconds_of
from pretrain_xla.errors import Interrupted, UserError
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.train.run import run
from pretrain_xla.train.stop_after import SUPERVISED_SINCE, stopping_after


@pytest.mark.parametrize(("text", "seconds"), [("8h30m", 30_600), ("45m", 2700), ("1d2s", 86_402), ("90s", 90)])
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "8.5h", "0s", "m", "30m8h", "-1h", "9" * 30 + "d"])
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=rf"test: stop_after='{text}' is not a time such as 8h30m, 45m or 1d"):
        build_config({"train": {"stop_after": text}}, "test")


def test_a_run_stops_saves_and_can_be_continued(
    make_config: Callable[..., RunConfig],
    tokens: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor started 88 seconds ago, and is given 90."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(SUPERVISED_SINCE, str(time.time() - 88))
    config = make_config(train={"train_steps": 10**6, "valid_steps": 1, "stop_after": "90s"})
    with pytest.raises(Interrupted, match=r"stopped at step \d+; the same command continues") as stopped:
        run(config)
    assert stopped.value.signal == signal.SIGTERM
    assert "90s are over (--stop-after)\n" in capfd.readouterr().err
    assert CheckpointStore(config.checkpoints_dir, limit=1).newest()


def test_a_run_that_ends_before_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUPERVISED_SINCE, str(time.time() - 59.7))
    with stopping_after("1m"), stopping_after(None):
        pass
    time.sleep(0.5)  # SIGTERM would end the tests
