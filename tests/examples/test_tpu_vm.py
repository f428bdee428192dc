"""The page on TPU VMs: its calls are gcloud's, and the messages that it explains are those of the programs that print them."""

from __future__ import annotations

import importlib.util
import mmap
import re
import shlex
from pathlib import Path

import pytest

from pretrain_xla.launch.gcloud import Kind, classify

from ..end_to_end.conftest import ROOT
from ..launch.gcloud.syntax import Call, read

PAGE = (ROOT / "docs" / "tpu-vm.md").read_text(encoding="utf-8")


def calls() -> list[Call]:
    """The calls of gcloud on the page that the table of its syntax knows."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\w+", "x", line), comments=True)
            if words[:3] == ["gcloud", "compute", "tpus"] or words[:3] == ["gcloud", "storage", "rsync"]:
                found.append(read(words[1:]))
    return found


def test_its_calls_agree_with_the_published_syntax() -> None:
    made = [call.words for call in calls()]
    assert len(made) >= 11
    create, delete = "compute tpus queued-resources create", "compute tpus queued-resources delete"
    assert made.index(create) < made.index("compute tpus tpu-vm ssh") < made.index(delete)
    # The last two show that nothing is left.
    assert made[-2:] == ["compute tpus queued-resources list", "compute tpus tpu-vm list"]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ('There is no more capacity in the zone "us-central1-c"', Kind.STOCKOUT),
        ("Insufficient reserved capacity", Kind.STOCKOUT),
        ("Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' exhausted", Kind.QUOTA),
        ("already exists", Kind.EXISTS),
        ("has not been used in project … before or it is disabled", Kind.PERMISSION),
        ("[/usr/bin/ssh] exited with return code [255]", Kind.UNREACHABLE),
    ],
)
def test_launch_takes_a_message_of_gcloud_for_the_same(message: str, kind: Kind) -> None:
    assert message in PAGE
    assert classify(message) is kind


def test_messages_of_libtpu_are_in_libtpu() -> None:
    messages = [
        "The TPU is already in use by process with pid ",
        ". Not attempting to load libtpu.so in this process.",
        'Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".',
    ]
    spec = importlib.util.find_spec("libtpu")
    assert spec is not None
    assert spec.origin is not None
    with (
        open(Path(spec.origin).parent / "libtpu.so", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        for message in messages:
            assert message in PAGE
            assert library.find(message.encode()) >= 0, message


@pytest.mark.parametrize(
    ("message", "file"),
    [
        ("but this host has no TPU: set PJRT_DEVICE=CPU to run here", "runtime/xla/environment.py"),
        ("; the same command continues from there", "train/trainer.py"),
        ("has not answered for", "runtime/hosts_watch.py"),
    ],
)
def test_our_own_messages_are_in_the_code(message: str, file: str) -> None:
    assert message in PAGE
    assert message in (ROOT / "pretrain_xla" / file).read_text(encoding="utf-8")
