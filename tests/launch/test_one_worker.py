"""Launches on a Google Cloud that fails as the real one does, with a real training in real processes on its worker.

At the end of each, the run's losses are those of a run that nobody disturbed, bit for bit, and nothing is left that would cost
money.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from pretrain_xla.errors import UserError

from .gcloud.state import SERVING, Record, new_zone
from .gcloud.world import World
from .runs import EVERY, Launcher, Records, check_nothing_is_left, check_secret_is_kept, workers

TYPE = "v5litepod-8"
QUOTA = SERVING.format("Preemptible")


def event(do: Record, **after: object) -> Record:
    return {"after": after, "do": do}


def test_until_a_zone_gives_a_slice_that_lasts(
    make_world: Callable[..., World], launch: Launcher, undisturbed: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(
        us_west4_a=new_zone(TYPE, quota={QUOTA: 4}),  # refused at once, for good
        us_central1_a=new_zone(TYPE, chips=0, stock_out="fails"),  # queued, then FAILED
        us_west1_c=new_zone(TYPE, chips=0),  # queued, and nothing comes
        us_south1_a=new_zone(TYPE, latency=0.3, quota={QUOTA: 8}),  # slow, with a quota for one slice
    )
    world.set(worker_environment=workers(world))
    world.plan(
        event({"fail": {"code": 13, "message": "Internal error"}}, state="PROVISIONING"),
        event({"suspend": True}, state="PROVISIONING", times=2),
        event({"preempt": "GONE"}, state="ACTIVE"),  # deleted right after it was created
    )
    assert launch("--zone", "us-west4-a", "us-central1-a", "us-west1-c", "us-south1-a") == 0
    check_nothing_is_left(world)
    assert launch.records == undisturbed
    created = [call for call in world.calls if "create" in call]
    asked = [next(word for word in call if word.startswith("--zone=")) for call in created]
    assert asked.count("--zone=us-west4-a") == 1, "a quota that is too small stays so"
    assert asked.count("--zone=us-south1-a") >= 4
    said = capsys.readouterr().out
    assert f"RESOURCE_EXHAUSTED: Quota limit '{QUOTA}' has been exceeded. Limit: 4 in zone us-west4-a" in said
    assert 'There is no more capacity in the zone "us-central1-a"' in said
    assert "us-south1-a: Internal error" in said


def test_preempted_at_set_up_in_training_and_twice_in_a_row(
    make_world: Callable[..., World], launch: Launcher, undisturbed: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(us_west4_a=new_zone(TYPE, quota={QUOTA: 8}))
    world.set(worker_environment=workers(world))
    world.plan(
        event({"preempt": "PREEMPTED"}, call="tpu-vm ssh", holding="setup.sh"),
        event({"preempt": "TERMINATED"}, step=30),
        event({"preempt": "READY"}, step=90),  # and nothing says so, but that it does not answer
    )
    assert launch("--zone", "us-west4-a") == 0
    check_nothing_is_left(world)
    assert launch.records == undisturbed
    assert len(world.machines) == 4
    check_secret_is_kept(world, launch.folder)
    assert os.environ["WANDB_API_KEY"] not in capsys.readouterr().out


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, whoever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_each_stage(
    make_world: Callable[..., World], launch: Launcher, undisturbed: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(us_west4_a=new_zone(TYPE))
    world.set(worker_environment=workers(world), launchers=[os.getpid()])
    set_up: Record = {"call": "tpu-vm ssh", "holding": "setup.sh"}
    for stages in (
        [{"call": "queued-resources create"}],
        [{"state": "PROVISIONING"}],
        [set_up, {"call": "queued-resources delete"}],
        [{"step": 2 * EVERY + 5}],
    ):
        world.plan(*(event({"signal": "SIGINT"}, **stage) for stage in stages))
        assert launch("--zone", "us-west4-a") == 130, stages
        check_nothing_is_left(world)
    assert "worker 0: stopped" in capsys.readouterr().out
    # Done, and being deleted: it is deleted all the same.
    world.plan(event({"signal": "SIGINT"}, call="queued-resources delete"))
    assert launch("--zone", "us-west4-a") == 0
    check_nothing_is_left(world)
    assert launch.records == undisturbed
    said = capsys.readouterr().out
    assert "Ctrl-C again leaves at once" in said
    assert "continuing from" in said


def test_without_login_and_without_quota(
    make_world: Callable[..., World], launch: Launcher, undisturbed: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(
        us_west4_a=new_zone(TYPE, quota={QUOTA: 0}),
        us_central1_a=new_zone(TYPE, quota={QUOTA: 4}, over_quota="fails"),
    )
    world.set(worker_environment=workers(world), account=None)
    with pytest.raises(UserError, match=r"gcloud auth login"):
        launch("--zone", "us-west4-a")
    assert world.count("create") == 0
    world.set(account="someone@example.com")
    assert launch("--zone", "us-west4-a", "us-central1-a") == 1
    said = capsys.readouterr().out
    assert f"us-west4-a: the quota {QUOTA} is 0, and {TYPE} has 8 chips" in said  # before anything is asked for
    assert f"Quota limit '{QUOTA}' has been exceeded. Limit: 0 in zone us-west4-a" in said
    assert f"Quota '{QUOTA}' exhausted. Limit 4 in zone us-central1-a" in said
    assert world.count("create") == 2
    check_nothing_is_left(world)
    # The login runs out while the run trains: what goes on costing is named. The same command takes over and ends it.
    with world.held() as state:
        state.data["zones"]["us-west4-a"]["quota"] = {}
    world.plan(event({"set": {"login_has_run_out": True}}, step=30))
    with pytest.raises(UserError, match=r"gcloud auth login"):
        launch("--zone", "us-west4-a")
    assert "gcloud compute tpus queued-resources delete run --zone=us-west4-a" in capsys.readouterr().out
    assert world.left() == ["us-west4-a/run"] * 2
    world.set(login_has_run_out=False)
    assert launch("--zone", "us-west4-a") == 0
    check_nothing_is_left(world)
    assert launch.records == undisturbed
    assert len(world.machines) == 1
