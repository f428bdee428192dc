"""gcloud's syntax as the stand-in knows it, against the table that the SDK ships, and what it refuses."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from .gcloud.syntax import COMMANDS, LISTED, SWITCH, WIDE, Misused, read

CREATE = (
    "compute tpus queued-resources create x --zone=us-west4-a --node-id x --accelerator-type v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite"
)


def published() -> dict[str, Any]:
    """The table of commands and flags that gcloud completes words by."""
    program = shutil.which("gcloud")
    path = Path(os.path.realpath(program)).parents[1] / "data/cli/gcloud_completions.py" if program else None
    if path is None or not path.is_file():
        pytest.skip("Google Cloud's SDK is not installed")
    tree: dict[str, Any] = runpy.run_path(str(path))["STATIC_COMPLETION_CLI_TREE"]
    return tree


def test_flags_are_those_that_the_sdk_publishes() -> None:
    tree = published()
    required = {"--runtime-version", "--service"}  # newer tables leave out what a release requires
    for command, syntax in COMMANDS.items():
        node = tree
        for word in command.replace("config get-value", "config get").split():
            node = node["commands"][word]
        theirs = {name for name, kind in node["flags"].items() if kind == "bool"}
        ours = {name for name, kind in syntax.flags.items() if kind == SWITCH}
        assert ours == theirs, command
        valued = {name for name, kind in syntax.flags.items() if kind != SWITCH}
        assert valued - required == {*node["flags"]} - theirs - required, command
    assert {*tree["flags"]} == {*WIDE}


def test_what_is_read() -> None:
    call = read(["--quiet", *CREATE.split(), "--spot", "--project", "p"])
    assert call.positionals == ("x",)
    assert call.values["--accelerator-type"] == "v5litepod-16"
    assert call.switches == {"--quiet", "--spot"}
    call = read("compute tpus tpu-vm ssh x --zone=z --ssh-flag=-oA=1 --ssh-flag=-oB=2 --command=ls -- -v".split())
    assert (call.listed["--ssh-flag"], call.remainder) == (("-oA=1", "-oB=2"), ("-v",))
    assert COMMANDS["compute tpus tpu-vm ssh"].flags["--ssh-flag"] == LISTED


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{CREATE} --foo", "unrecognized arguments: --foo"),
        (f"{CREATE} --spot=3", "argument --spot: ignored explicit argument '3'"),
        (f"{CREATE} --zone", "argument --zone: expected one argument"),
        (f"{CREATE} --node-count=2", "Exactly one of (--node-id | --node-count) must be specified."),
        (f"{CREATE} y", "unrecognized arguments: y"),
        (
            f"{CREATE} --provisioning-model=spot",
            "gcloud alpha compute tpus queued-resources create --provisioning-model",
        ),
        (
            CREATE.replace("--accelerator-type v5litepod-16", ""),
            "Exactly one of (--accelerator-type | --topology --type)",
        ),
        (CREATE.replace(" x --zone", " --zone"), "argument QUEUED_RESOURCE: Must be specified."),
        ("compute tpus queued-resources describ x", "Invalid choice: 'describ'."),
        ("compute tpus", "Command name argument expected."),
    ],
)
def test_what_is_refused(line: str, said: str) -> None:
    with pytest.raises(Misused) as refused:
        read(line.split())
    assert said in refused.value.text
    assert refused.value.status == 2
