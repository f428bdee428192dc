"""The parts of a launch that need no gcloud: what a topology means, what an error means, the state, checks, progress, times."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.errors import UserError
from pretrain_xla.launch import archive, checks
from pretrain_xla.launch import state as states
from pretrain_xla.launch.bucket import OtherBucket
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.context import Launch
from pretrain_xla.launch.gcloud import Kind, classify, error_line
from pretrain_xla.launch.progress import amount, progress_line
from pretrain_xla.launch.slices import ZONES, check_zones, resolve_slice
from pretrain_xla.launch.state import Lease, State
from pretrain_xla.launch.timing import VARIABLE, Timing, timing

from .gcloud import texts
from .gcloud.state import chips, hosts


def make_state(**changes: Any) -> State:
    plain: dict[str, Any] = {
        field.name: [] if "list" in str(field.type) else {} if "dict" in str(field.type) else 0
        for field in dataclasses.fields(State)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    named = {"name": "mine", "bucket": "file:///b", "topology": "v5e-8", "tier": "spot", "zones": ["us-west4-a"]}
    return State(**plain | named | changes)


@pytest.mark.parametrize(
    ("topology", "kind", "hosts_wanted", "quota"),
    [
        ("v2-8", "v2-8", 1, "TPUV2PreemptiblePerProjectPerZoneForTPUAPI"),
        ("v3-32", "v3-32", 4, "TPUV3PreemptiblePerProjectPerZoneForTPUAPI"),
        ("v4-32", "v4-32", 4, "TPUV4sPreemptiblePodPerProjectPerZoneForTPUAPI"),
        ("v5e-1", "v5litepod-1", 1, "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI"),
        ("v5e:2x4", "v5litepod-8", 1, "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI"),
        ("v5litepod-16", "v5litepod-16", 4, "TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI"),
        ("v5p-128", "v5p-128", 16, "TPUV5PPreemptiblePerProjectPerZoneForTPUAPI"),
        ("v6e-256", "v6e-256", 64, "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI"),
    ],
)
def test_what_a_topology_means(topology: str, kind: str, hosts_wanted: int, quota: str) -> None:
    found = resolve_slice(topology)
    assert (found.accelerator_type, found.hosts, found.quota_id("spot")) == (kind, hosts_wanted, quota)
    assert (found.chips, found.hosts) == (chips(kind), hosts(kind)), "the stand-in counts alike, by its own rules"
    assert found.quota_id("on-demand") == quota.replace("Preemptible", "")
    assert found.price("us-west4-a") < found.price("europe-west4-b")
    zones = ZONES[found.generation]
    assert check_zones(zones, found) == []
    assert "is not among the zones" in check_zones(("mars-east1-a",), found)[0]


def quota_text() -> str:
    return str(texts.quota_exhausted("TPUV6EPreemptiblePerProjectPerRegionForTPUAPI", 4, "us-east5-b")["message"])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.LOGIN, texts.NOT_LOGGED_IN),
        (Kind.LOGIN, texts.REAUTHENTICATE),
        (Kind.QUOTA, texts.quota_exceeded("TPUV4sPodPerProjectPerZoneForTPUAPI", 0, "us-central2-b").text),
        (Kind.QUOTA, quota_text()),
        (Kind.STOCKOUT, texts.no_capacity("us-west4-a")["message"]),
        (Kind.STOCKOUT, texts.no_reserved_capacity()["message"]),
        (Kind.NOT_OFFERED, texts.no_such_type("v6e-8", "us-west4-a").text),
        (Kind.NOT_OFFERED, texts.no_such_zone("mars").text),
        (Kind.NOT_OFFERED, texts.zone_denied("us-central2-b", "me").text),
        (Kind.NOT_OFFERED, texts.no_flex_start("v5litepod-1", "europe-west4-a")["message"]),
        (Kind.EXISTS, texts.already_exists("projects/p/locations/z/queuedResources/mine").text),
        (Kind.NOT_FOUND, texts.not_found("projects/p/locations/z/nodes/mine", "me").text),
        (Kind.NOT_FOUND, "The following URLs matched no objects or files:\ngs://b/launch.json"),
        (Kind.NOT_FOUND, "gs://b not found: 404."),
        (Kind.UNREACHABLE, texts.TIMED_OUT.format(address="10.0.0.1")),
        (Kind.UNREACHABLE, f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) {texts.EXITED}"),
        (Kind.UNREACHABLE, texts.unusable("PREEMPTED").text),
        (Kind.REMOTE, "pip: connection timed out\nERROR: (gcloud…ssh) [/usr/bin/ssh] exited with return code [1]."),
        (Kind.TRANSIENT, "UNAVAILABLE: The service is currently unavailable."),
        (Kind.TRANSIENT, "HTTPError 503: backend error"),
        (Kind.TRANSIENT, "There was a problem connecting: [Errno 8] nodename nor servname provided"),
        (Kind.PERMISSION, "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled."),
        (Kind.OTHER, "something new"),
    ],
)
def test_what_an_error_means(kind: Kind, text: str) -> None:
    assert classify(text) is kind


def test_an_error_in_one_line() -> None:
    stderr = "WARNING: old\nERROR: (gcloud.x) NOT_FOUND: no\nsuch thing\n"
    assert error_line(stderr, 1) == "NOT_FOUND: no such thing"
    assert error_line("bad\n[/usr/bin/ssh] exited with return code [2].", 2).startswith("bad [/usr")
    assert error_line("ERROR: ", 7) == "status 7"


def test_the_state_costs_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.FOLDER, str(tmp_path))
    state = make_state(bucket=f"file://{tmp_path}/bucket")
    state.leases = [Lease("a", 0.0, 3600.0, 10.0), Lease("b", 7200.0, None, 20.0)]
    assert (state.hours(9000.0), state.dollars(9000.0)) == (1.5, 20.0)
    bucket = OtherBucket(state.bucket)
    assert states.newest("mine", bucket) is None
    states.write_local(state)
    assert states.newest("mine", bucket) == state
    assert (tmp_path / "mine.json").stat().st_mode & 0o077 == 0
    later = dataclasses.replace(state, phase="running", holder="elsewhere process 7", holder_seen=9.0)
    bucket.write(states.FILE, later.to_json())
    assert states.newest("mine", bucket) == later
    with pytest.raises(states.LookedAfter, match="looked after by elsewhere process 7, 91 s ago"):
        states.check_free(later, 100.0, 180.0)
    states.check_free(later, 200.0, 180.0)
    states.check_free(dataclasses.replace(later, phase="done"), 100.0, 180.0)
    moved = OtherBucket(f"file://{tmp_path}/other")
    assert states.newest("mine", moved) is None, "another run of this name"
    for content in (b"[]", b"{}", b"{", b'{"leases": [], "more": 1}'):
        bucket.write(states.FILE, content)
        with pytest.raises(UserError, match="is not the state of a launch"):
            states.newest("mine", bucket)


def test_one_launcher_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.FOLDER, str(tmp_path))
    with states.alone("mine"):
        with pytest.raises(states.LookedAfter, match="looked after by process") as found, states.alone("mine"):
            pass
        assert found.value.process is not None
        with states.alone("other"):
            pass
    with states.alone("mine"):
        pass


def test_quotas() -> None:
    info = {"details": {"value": "64"}, "dimensions": {"zone": "us-west4-a"}}
    default = {"details": {"value": "8"}, "applicableLocations": ["us-west4-b"]}
    endless = {"details": {"value": "-1"}, "dimensions": {"zone": "us-west1-c"}}
    found = checks.quota_limits({"dimensionsInfos": [info, default, endless, {"details": {}}]})
    assert found == {"us-west4-a": 64.0, "us-west4-b": 8.0, "": 8.0, "us-west1-c": float("inf")}
    assert checks.quota_limits({}) == checks.quota_limits([]) == {}


@pytest.mark.parametrize(
    ("location", "zone", "near"),
    [
        ("us-west4", "us-west4-a", True),
        ("us", "us-west4-a", True),
        ("eu", "europe-west4-b", True),
        ("us-west1", "us-west4-a", False),
    ],
)
def test_near(location: str, zone: str, near: bool) -> None:
    assert checks.is_near(location, zone) is near


def test_the_price_against_the_budget() -> None:
    report = {
        "run": {
            "hours_optimistic": 1.0,
            "hours_conservative": 2.0,
            "dollars_optimistic": 10.0,
            "dollars_conservative": 20.0,
        }
    }
    assert checks.check_price(report, None, None)[1] == "the run is estimated to take $10.00 to $20.00"
    assert "it may be stopped before its end, by --max-dollars 15" in checks.check_price(report, 15.0, 3.0)
    with pytest.raises(UserError, match=r"estimated to take 1.0 h to 2.0 h, and --max-hours is 0.5"):
        checks.check_price(report, None, 0.5)


def config(**changes: dict[str, Any]) -> RunConfig:
    return build_config({"data": {"train_dir": "gs://b/train", "valid_dir": "gs://b/valid"}, **changes}, "test")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed file, one changed, one new."""
    folder = tmp_path / "code"
    folder.mkdir()
    git = ("git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e")
    subprocess.run([*git, "init", "-q"], check=True)
    (folder / "old.yaml").write_text("old")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (folder / "old.yaml").write_text("changed")
    (folder / "new.yaml").write_text("new")
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").write_text("x")
    return folder


def test_the_code_is_what_is_committed_or_asked_for(repository: Path, tmp_path: Path) -> None:
    folder = str(repository)
    assert sorted(archive.changes(folder)) == [".gitignore", "new.yaml", "old.yaml"]
    for uncommitted, expected in ((False, {"old.yaml": "old"}), (True, {"old.yaml": "changed", "new.yaml": "new"})):
        (out := tmp_path / str(uncommitted)).mkdir()
        subprocess.run(["tar", "-xz", "-C", str(out)], input=archive.pack(folder, uncommitted), check=True)
        found = {path.name: path.read_text() for path in out.iterdir() if path.suffix == ".yaml"}
        assert found == expected
        assert not (out / "ignored").exists()
        assert archive.holds(folder, "new.yaml", uncommitted) is uncommitted
    assert sorted(archive.changes(folder)) == [".gitignore", "new.yaml", "old.yaml"], "the user's index is as it was"


@pytest.mark.parametrize(
    ("arguments", "data", "said"),
    [
        (
            ["--config", "new.yaml"],
            {},
            "--config new.yaml is not in the committed code, so no worker will have it: commit it",
        ),
        (["--run-dir", "x"], {}, "--run-dir is set by the launch: leave it out"),
        (["--checkpoints_dir=x"], {}, "--checkpoints-dir is set by the launch"),
        (["--train-dir", "s3://A:SECRET@b/c"], {}, "holds a password or token in a URL"),
        ([], {"train_dir": "data/mine"}, r"--train-dir data/mine is not in the committed code.*gcloud storage cp"),
    ],
)
def test_what_no_worker_would_have(repository: Path, arguments: list[str], data: dict[str, str], said: str) -> None:
    chosen = config(data={"train_dir": "gs://b/train", "valid_dir": "hf:d/e", **data})
    with pytest.raises(UserError, match=said):
        checks.check_arguments(arguments, chosen, str(repository), uncommitted=False)
    assert checks.check_arguments(["--config=old.yaml"], config(), str(repository), uncommitted=False) == []


def test_which_secrets_are_passed_on() -> None:
    wandb = config(wandb={"wandb_logging": True})
    with pytest.raises(UserError, match="WANDB_API_KEY is not set in the environment"):
        checks.chosen_secrets([], wandb, {})
    assert checks.chosen_secrets([], wandb, {"WANDB_MODE": "offline"}) == []
    assert checks.chosen_secrets(["A"], wandb, {"A": "1", "WANDB_API_KEY": "2", "HF_TOKEN": "3"}) == [
        "A",
        "WANDB_API_KEY",
        "HF_TOKEN",
    ]
    assert checks.traffic(config(), 124_000_000) == pytest.approx(20 * 124e6 * 12 / 1e9 + 20_000 * 32 * 512 * 2 / 1e9)


def test_progress() -> None:
    state = make_state(leases=[Lease("a", 0.0, None, 19.2)])
    state.progress = {"step": 1200, "steps": 20_000, "loss": 3.41, "tokens_per_second": 104_000.0, "mfu": 0.412}
    assert progress_line(state, 262_144, 3600.0) == (
        "step 1,200/20,000, loss 3.4100, 104k tokens/s, MFU 41%, 1.00 h and $19.20 so far, 13.16 h and $252.73 to go"
    )
    state.progress = {"step": 1, "steps": 20, "loss": 3.0}
    assert progress_line(state, 8, 0.0) == "step 1/20, loss 3.0000, 0.00 h and $0.00 so far"
    assert [amount(count) for count in (950, 1_234_567)] == ["950", "1.23M"]


def test_times_can_be_shortened() -> None:
    assert timing({}) == Timing()
    assert timing({VARIABLE: "poll=0.1,lease=2"}) == dataclasses.replace(Timing(), poll=0.1, lease=2.0)
    for wrong in ("pol=1", "poll=x", "poll=-1", "poll"):
        with pytest.raises(UserError, match=f"{VARIABLE}: '{wrong}' is not one of"):
            timing({VARIABLE: wrong})


def test_the_state_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.FOLDER, str(tmp_path))
    bucket, said = OtherBucket(f"file://{tmp_path}/bucket"), list[str]()
    secret: dict[str, str] = {"WANDB_API_KEY": "s3cr3t"}
    none: Any = None
    launch = Launch(make_state(), none, none, bucket, Clock(), Timing(), secret, said.append)
    launch.enter("failed", "the service refused s3cr3t at https://me:pass@host/x")
    launch.say("s3cr3t")
    assert launch.state.message == "the service refused *** at https://***@host/x"
    assert (
        "s3cr3t" not in (tmp_path / "mine.json").read_text() + (tmp_path / "bucket" / states.FILE).read_text() + said[0]
    )
