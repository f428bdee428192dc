"""A Google Cloud of its own for a test."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .gcloud.state import Record
from .gcloud.world import World

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
