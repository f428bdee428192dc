"""The stand-in for gcloud itself: requests and their states, capacity and quota, errors, and real processes on workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from .conftest import Run
from .gcloud import machines
from .gcloud.state import chips, hosts, new_zone
from .gcloud.world import World

CREATE = (
    "compute tpus queued-resources create {name} --node-id={name} --zone=us-west4-a --accelerator-type={kind} "
    "--runtime-version=v2-alpha-tpuv5-lite --spot --quiet"
)
QUEUED = "compute tpus queued-resources"
SSH = "compute tpus tpu-vm ssh run --zone=us-west4-a --quiet"
QUOTA = "TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI"


def create(gcloud: Run, name: str = "run", kind: str = "v5litepod-16") -> subprocess.CompletedProcess[str]:
    return gcloud(CREATE.format(name=name, kind=kind))


def state_of(gcloud: Run, name: str = "run") -> str:
    done = gcloud(f"{QUEUED} describe {name} --zone=us-west4-a --format=json")
    return str(json.loads(done.stdout)["state"]["state"]) if done.returncode == 0 else "NOT_FOUND"


def wait_for(gcloud: Run, name: str, state: str) -> None:
    limit = time.monotonic() + 30
    while state_of(gcloud, name) != state:
        assert time.monotonic() < limit, state_of(gcloud, name)
        time.sleep(0.02)


def node_state(gcloud: Run, name: str = "run") -> str:
    done = gcloud(f"compute tpus tpu-vm describe {name} --zone=us-west4-a --format=json")
    return str(json.loads(done.stdout)["state"]) if done.returncode == 0 else done.stderr


def test_sizes_of_slices() -> None:
    assert [chips(kind) for kind in ("v5litepod-16", "v6e-8", "v4-32", "v5p-16", "v3-8")] == [16, 8, 16, 8, 4]
    assert [hosts(kind) for kind in ("v5litepod-8", "v5litepod-16", "v6e-256", "v4-16", "v4-8")] == [1, 4, 64, 2, 1]


def test_a_request_and_its_node(make_world: Callable[..., World], gcloud: Run) -> None:
    world = make_world(us_west4_a=new_zone("v5litepod-16", "v4-16", chips=16, quota={QUOTA: 32}))
    done = create(gcloud)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("Create request issued for: [run]\nWaiting for operation [")
    wait_for(gcloud, "run", "ACTIVE")
    assert node_state(gcloud) == "READY"
    assert (
        "ALREADY_EXISTS: Resource 'projects/a-project/locations/us-west4-a/queuedResources/run'"
        in create(gcloud).stderr
    )
    # No more chips: it waits, and counts against the quota all the same.
    create(gcloud, "second")
    wait_for(gcloud, "second", "WAITING_FOR_RESOURCES")
    done = create(gcloud, "third")
    assert (done.returncode, done.stderr) == (
        1,
        "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
        f"'{QUOTA}' has been exceeded. Limit: 32 in zone us-west4-a.\n",
    )
    done = create(gcloud, "third", "v6e-8")
    assert 'for accelerator type, "v6e-8", could not be found in the zonal accelerator' in done.stderr
    # Its VM is deleted: the request stays, SUSPENDED, and must be deleted, too.
    assert "FAILED_PRECONDITION" in gcloud(f"{QUEUED} delete run --zone=us-west4-a").stderr
    assert gcloud("compute tpus tpu-vm delete run --zone=us-west4-a --quiet").returncode == 0
    assert "NOT_FOUND: Resource 'projects/a-project/locations/us-west4-a/nodes/run' was not found" in node_state(gcloud)
    wait_for(gcloud, "run", "SUSPENDED")
    wait_for(gcloud, "second", "ACTIVE")
    for name, force in (("run", ""), ("second", "--force")):
        assert gcloud(f"{QUEUED} delete {name} --zone=us-west4-a --quiet {force}").returncode == 0
        assert state_of(gcloud, name) == "NOT_FOUND"
    assert world.left() == []
    # A stock-out that is told, and a request that no account makes.
    with world.held() as state:
        state.data["zones"]["us-west4-a"] |= {"chips": 0, "stock_out": "fails"}
    create(gcloud)
    wait_for(gcloud, "run", "FAILED")
    shown = json.loads(gcloud(f"{QUEUED} list --zone=us-west4-a --format=json").stdout)
    assert 'There is no more capacity in the zone "us-west4-a"' in shown[0]["state"]["failedData"]["error"]["message"]
    world.set(account=None)
    assert json.loads(gcloud("config list --format=json").stdout)["core"] == {
        "project": "a-project",
        "disable_usage_reporting": "True",
    }
    assert create(gcloud).stderr.startswith(
        "ERROR: (gcloud.compute.tpus.queued-resources.create) You do not currently have an active account selected.\n"
    )


def test_processes_on_workers(make_world: Callable[..., World], gcloud: Run) -> None:
    world = make_world(us_west4_a=new_zone("v4-16"))
    create(gcloud, kind="v4-16")
    wait_for(gcloud, "run", "ACTIVE")
    first, second = world.machines
    # Output, errors, status, standard input, and a home for each worker.
    done = gcloud(f"{SSH} --worker=1", "--command=cat > file; pwd; echo bad >&2; exit 7", stdin="sent")
    assert (done.returncode, done.stdout) == (7, f"{second / 'home'}\n")
    assert done.stderr.endswith("SSH: Attempting to connect to worker 1...\nbad\n")
    assert (second / "home" / "file").read_text() == "sent"
    done = gcloud(f"{SSH} --worker=all", "--command=test -e file")
    assert done.returncode == 1
    assert "##### Command execution on worker 0 failed with exit status 1. Continuing." in done.stderr
    assert gcloud(f"compute tpus tpu-vm scp {second}/home/file run: --zone=us-west4-a --worker=0").returncode == 0
    assert (first / "home" / "file").read_text() == "sent"
    # A connection drops: gcloud runs the command again, and the first goes on by itself.
    world.plan({"after": {"call": "tpu-vm ssh", "holding": "again", "seconds": 1.0}, "do": {"drop": 0}})
    done = gcloud(SSH, "--command=echo again >> begun; sleep 2; echo again >> ended", "--worker=0")
    assert done.returncode == 0
    assert (
        "client_loop: send disconnect: Broken pipe\nRetrying: SSH command error: [/usr/bin/ssh] exited with"
        in done.stderr
    )
    assert (first / "home" / "begun").read_text() == (first / "home" / "ended").read_text() == "again\n" * 2
    # What is detached outlives its connection, until the machine goes; then nothing is left, and nobody can connect.
    detached = "(setsid setsid sleep 600 & setsid sleep 600 &) </dev/null >/dev/null 2>&1; echo done"
    assert gcloud(SSH, f"--command={detached}").stdout == "done\n"
    limit = time.monotonic() + 10
    while [line for line in machines.commands(first) if "sh " not in line].count("sleep 600 ") < 2:
        assert time.monotonic() < limit, machines.commands(first)
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    world.plan(
        {"after": {"call": "tpu-vm ssh", "holding": "sleep 601", "seconds": 0.2}, "do": {"preempt": "PREEMPTED"}}
    )
    done = gcloud(SSH, "--command=sleep 601")
    assert done.returncode == 255
    assert done.stderr.endswith(
        "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].\n"
    )
    assert machines.commands(first) == []
    assert bystander.poll() is None
    os.kill(bystander.pid, signal.SIGKILL)
    bystander.wait()
    groups = {*(first / "groups").read_text().split()}
    assert len(groups) >= 3
    assert str(os.getpgid(0)) not in groups
    assert 'state "PREEMPTED", so it cannot be used' in gcloud(
        SSH, "--command=true"
    ).stderr or "NOT_FOUND" in node_state(gcloud)
    wait_for(gcloud, "run", "SUSPENDED")
    assert world.open_events() == []


def test_buckets(make_world: Callable[..., World], gcloud: Run, tmp_path: Path) -> None:
    make_world()
    assert json.loads(gcloud("storage buckets describe gs://bucket --format=json").stdout)["location"] == "US-WEST4"
    assert gcloud("storage buckets describe gs://other --format=json").stderr.endswith("gs://other not found: 404.\n")
    assert gcloud("storage cp - gs://bucket/a/b.json --quiet", stdin="{}").returncode == 0
    assert gcloud("storage cat gs://bucket/a/b.json").stdout == "{}"
    assert "matched no objects" in gcloud("storage cat gs://bucket/a/c.json").stderr
    assert gcloud(f"storage rsync gs://bucket/a {tmp_path}/copy --recursive").returncode == 0
    assert (tmp_path / "copy" / "b.json").read_text() == "{}"
