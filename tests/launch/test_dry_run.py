"""`--dry-run`: the calls for slices of every kind agree with gcloud's published syntax, and say what was asked for."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.launch.command import launch_command

from .gcloud.syntax import Call, read

ZONES = ("us-west4-a", "us-central2-b")
RUN = ("--", "--config", "configs/modern_124m.yaml", "--wandb-logging")


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The lines of a dry run."""
    assert launch_command([*flags, "--dry-run", *RUN]) == 0
    return capsys.readouterr().out.splitlines()


def calls(lines: list[str]) -> list[Call]:
    """The calls of gcloud in the lines, each of which is one command for a shell."""
    found = []
    for line in lines:
        if line.startswith(("#", "note: ")):
            continue
        inner = re.sub(r"^for worker in \$\(seq 0 \d+\); do (.*); done$", r"\1", line).replace("=$worker", "=7")
        words = shlex.split(inner, comments=True)
        begin = words.index("gcloud")
        assert begin == 0 or words[:begin] == ["git", "archive", "--format=tar.gz", "HEAD", "|"]
        end = words.index("<") if "<" in words else len(words)
        found.append(read(words[begin + 1 : end]))
    return found


@pytest.mark.parametrize(
    ("topology", "kind", "hosts", "version"),
    [
        ("v5e-8", "v5litepod-8", 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-64", "v5litepod-64", 16, "v2-alpha-tpuv5-lite"),
        ("v4-32", "v4-32", 4, "tpu-ubuntu2204-base"),
        ("v6e-256", "v6e-256", 64, "v2-alpha-tpuv6e"),
    ],
)
@pytest.mark.parametrize("tier", ["", "--spot", "--reserved", "--flex-start"])
def test_the_calls_agree_with_the_published_syntax(
    topology: str, kind: str, hosts: int, version: str, tier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--topology", topology, "--zone", *ZONES, "--bucket", "gs://B/runs/mine", *([tier] if tier else [])]
    lines = printed(capsys, *flags, "--internal-ips", "--project", "p", "--secret", "WANDB_API_KEY")
    made = calls(lines)
    assert all("--quiet" in call.switches for call in made)
    assert all(call.values.get("--project") == "p" for call in made[1:])
    commands = [call.words.removeprefix("compute tpus ") for call in made]
    created = [call for call in made if call.words.endswith("create")]
    assert [call.values["--zone"] for call in created] == [*ZONES]
    for call in created:
        assert call.positionals == ("mine",)
        assert (call.values["--accelerator-type"], call.values["--runtime-version"]) == (kind, version)
        assert (("--spot" in call.switches), ("--reserved" in call.switches)) == (
            tier == "--spot",
            tier == "--reserved",
        )
        assert (call.values.get("--provisioning-model"), call.command.startswith("alpha ")) == (
            ("flex-start", True) if tier == "--flex-start" else (None, False)
        )
        assert call.values["--node-id"] == "mine"
        assert (call.values["--valid-after-duration"], call.values["--valid-until-duration"]) == ("0s", "1800s")
    # In order: look, create, set up and start on each worker, follow, delete, look.
    order = ["accelerator-types describe", "queued-resources create", "tpu-vm ssh", "queued-resources list"]
    assert sorted(order, key=commands.index) == order
    assert commands[-5:] == ["queued-resources delete", *2 * ["queued-resources list", "tpu-vm list"]]
    each = [line for line in lines if line.startswith("for worker")]
    assert len(each) == (0 if hosts == 1 else 3)
    assert all(f"seq 0 {hosts - 1})" in line for line in each)
    assert 'WANDB_API_KEY": "***' in "\n".join(lines)
    with_ssh: list[Any] = [call for call in made if call.words.endswith("ssh")]
    assert len(with_ssh) == 4
    assert all("-oServerAliveInterval=15" in call.listed["--ssh-flag"] for call in with_ssh)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5e-7"], "no such size"),
        (["--topology", "v4-2"], "Google Cloud has v4 from 4 chips on"),
        (["--zone", "nowhere"], "--zone nowhere: not a zone; v5e is in us-west4-a"),
        (["--zone"], "name the zones to ask with --zone, one or more of us-west4-a"),
        (["--bucket", "mine"], "name a folder in a bucket"),
        (["--bucket", "gs://B"], "name a folder in that bucket, such as gs://B/runs/NAME"),
        (["--name", "Mine"], "begin with a letter, then small letters"),
        (["--reserved"], "--spot, --reserved and --flex-start exclude each other"),
        (["--max-dollars", "0"], "--max-dollars 0: must be more than 0"),
        (["--env", "HF_TOKEN=x"], "export HF_TOKEN here, and give --secret HF_TOKEN"),
        (["--env", "A"], "--env A: write it as NAME=VALUE"),
    ],
)
def test_a_wrong_request_is_one_line(flags: list[str], said: str) -> None:
    usual = ["--topology", "v5e-8", "--zone", "us-west4-a", "--bucket", "gs://B/runs/mine", "--spot"]
    with pytest.raises(UserError, match=re.escape(said)):
        launch_command([*usual, *flags, "--dry-run", *RUN])


def test_the_run_must_be_named() -> None:
    with pytest.raises(UserError, match="name the run's flags after `--`"):
        launch_command(["--topology", "v5e-8", "--zone", "us-west4-a", "--bucket", "gs://B/runs/mine"])
