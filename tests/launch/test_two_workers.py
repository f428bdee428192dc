"""A launch on two workers that train together: one is half installed, connections drop, one of them is lost.

They are two processes of torch DDP, whose environment is that of each worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ..servers import free_port
from .gcloud.state import new_zone
from .gcloud.world import World
from .runs import STEPS, Launcher, check_nothing_is_left, check_secret_is_kept, run_undisturbed, workers


def together(worker: str) -> dict[str, str]:
    """The environment of a worker."""
    return {
        "RANK": worker,
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def test_half_installed_dropped_and_lost(
    tmp_path: Path, make_world: Callable[..., World], launch: Launcher, flags: Callable[..., list[str]]
) -> None:
    world = make_world(us_central2_b=new_zone("v4-16"))
    common = together("{worker}")
    undisturbed = run_undisturbed(tmp_path / "undisturbed", flags, *({**common, "RANK": rank} for rank in "01"))
    world.set(worker_environment=workers(world, **common | {"MASTER_PORT": str(free_port())}))
    world.plan(
        {"after": {"state": "ACTIVE"}, "do": {"touch": "interrupt-install", "worker": 1}},
        {"after": {"file": "interrupted", "worker": 1}, "do": {"reboot": 1}},
        {"after": {"step": 10}, "do": {"drop": 0}},
        {"after": {"step": 35}, "do": {"unreachable": 0, "for": 1.0}},
        {"after": {"step": 75}, "do": {"reboot": 1}},
    )
    assert launch("--zone", "us-central2-b", topology="v4-16") == 0
    check_nothing_is_left(world)
    assert launch.records == undisturbed
    assert len(world.machines) == 2, "no second slice was needed"
    check_secret_is_kept(world, tmp_path)
    # Each line of the log came once, over whichever connection.
    log = (launch.folder / "records" / "launch" / "log_1.txt").read_text()
    steps = [int(step) for step in re.findall(rf"^step +(\d+)/{STEPS} ", log, re.MULTILINE)]
    begins = [place for place, step in enumerate(steps) if place == 0 or step != steps[place - 1] + 1]
    assert len(begins) == 2, "one start, and one after the loss"
    assert steps[-1] == STEPS
    assert json.loads((launch.folder / "bucket" / "run" / "launch.json").read_text())["phase"] == "done"
