"""For tests: a Google Cloud of their own, as a folder, a program `gcloud`, and a thread that lets time pass."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import clock, machines
from .state import Record, State, held, new_state

ROOT = Path(__file__).resolve().parents[3]
_PROGRAM = """#!{python} -S
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.launch.gcloud.main import main
sys.exit(main(Path({folder!r}), sys.argv[1:]))
"""


class World:
    """A project of Google Cloud below a folder."""

    def __init__(self, folder: Path, **zones: Record) -> None:
        self.folder = folder / "cloud"
        self.most = 0
        """The most nodes that were there at a time."""
        self.processes: set[str] = set()
        self.environments: set[str] = set()
        """Command lines and environments that were seen on workers."""
        for part in ("bin", "machines", "buckets/bucket"):
            (self.folder / part).mkdir(parents=True)
        found = {name.replace("_", "-"): zone for name, zone in zones.items()}
        (self.folder / "state.json").write_text(json.dumps(new_state(found)))
        program = self.folder / "bin" / "gcloud"
        program.write_text(_PROGRAM.format(python=sys.executable, root=str(ROOT), folder=str(self.folder)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def path(self) -> str:
        """PATH with the program first."""
        return f"{self.folder / 'bin'}:{os.environ['PATH']}"

    @contextlib.contextmanager
    def held(self) -> Iterator[State]:
        """The state, to look at or to change."""
        with held(self.folder) as state:
            yield state

    def plan(self, *planned: Record) -> None:
        """Add to the list of events."""
        with self.held() as state:
            state.data["events"] += planned

    def set(self, **changes: Any) -> None:
        """Change the state."""
        with self.held() as state:
            state.data.update(changes)

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        """Let time pass, and kill all that runs on the machines at the end."""
        over = threading.Event()
        broken: list[BaseException] = []

        def pass_time() -> None:
            try:
                for tick in itertools.count():
                    if over.wait(0.05):
                        return
                    self._look(everywhere=tick % 10 == 0)
            except BaseException as error:
                broken.append(error)
                raise

        thread = threading.Thread(target=pass_time, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            for machine in self.machines:
                machines.kill(machine)
        assert not broken, broken

    def _look(self, everywhere: bool) -> None:
        with self.held() as state:
            clock.advance(state)
            nodes = state.data["nodes"].values()
            self.most = max(self.most, len(nodes))
            there = [state.machine(node, worker) for node in nodes for worker in range(node["workers"])]
        for machine in there if everywhere else ():
            self.processes.update(machines.commands(machine))
            self.environments.update(machines.environments(machine))

    @property
    def machines(self) -> list[Path]:
        """All workers that ever were, the oldest first."""
        found = self.folder.glob("machines/*/w*")
        return sorted(found, key=lambda path: (int(path.parent.name.split("_")[0]), path.name))

    @property
    def calls(self) -> list[list[str]]:
        """The calls so far."""
        lines = map(json.loads, (self.folder / "calls").read_text().splitlines())
        return [line for line in lines if isinstance(line, list)]

    def count(self, *words: str) -> int:
        """How many calls have all of these words."""
        return sum(all(word in call for word in words) for call in self.calls)

    def left(self) -> list[str]:
        """Requests and nodes that are still there."""
        with self.held() as state:
            clock.advance(state)
            return [*state.data["queued"], *state.data["nodes"]]

    def open_events(self) -> list[Record]:
        """Events that have not happened."""
        with self.held() as state:
            return [event for event in state.data["events"] if not event.get("done")]
