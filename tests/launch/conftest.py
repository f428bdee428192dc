"""A Google Cloud of its own for a test."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..end_to_end.conftest import flags, tokens
from .gcloud.state import Record
from .gcloud.world import World
from .runs import SECRET, TIMING, Launcher, Records, run_undisturbed

__all__ = ["flags", "tokens"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Makes a world of the given zones, with its `gcloud` first on PATH; time passes in it until the end of the test."""
    made = []

    def make(**zones: Record) -> World:
        world = World(tmp_path, **zones)
        monkeypatch.setenv("PATH", world.path)
        passing = world.running()
        passing.__enter__()
        made.append(passing)
        return world

    yield make
    for passing in made:
        passing.__exit__(None, None, None)


@pytest.fixture
def gcloud() -> Run:
    """Runs `gcloud WORDS…` with further arguments that may hold spaces."""

    def run(words: str, *more: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["gcloud", *words.split(), *more], input=stdin, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def launch(tmp_path: Path, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Launches runs whose pauses are short, with a secret in the environment."""
    monkeypatch.setenv("PRETRAIN_XLA_LAUNCH_TIMING", ",".join(f"{name}={value}" for name, value in TIMING.items()))
    monkeypatch.setenv("PRETRAIN_XLA_LAUNCH_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return Launcher(tmp_path, flags)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]]) -> Records:
    """What the run of one worker logs if nobody disturbs it."""
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), flags, {})
