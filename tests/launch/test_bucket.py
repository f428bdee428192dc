"""The folder of a run in a bucket, through gcloud, and at another URL: the same files in both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.launch.bucket import open_bucket
from pretrain_xla.launch.calls import Calls
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.gcloud import Gcloud
from pretrain_xla.launch.timing import Timing

from .gcloud.world import World

BYTES = bytes(range(256))


@pytest.mark.parametrize("kind", ["gs", "file"])
def test_files_of_a_run(kind: str, make_world: Callable[..., World], tmp_path: Path) -> None:
    make_world()
    gcloud = Gcloud(Clock(), Timing())
    url = "gs://bucket/runs/mine/" if kind == "gs" else f"file://{tmp_path}/runs/mine"
    bucket = open_bucket(url, gcloud, Calls("mine", "a-project"))
    assert bucket.read("launch.json") is None
    bucket.write("code.tar.gz", BYTES)
    assert bucket.read("code.tar.gz") == BYTES
    bucket.write("code.tar.gz", b"other")
    assert bucket.read("code.tar.gz") == b"other"
    bucket.write("checkpoints/records/metrics.jsonl", b"{}")
    bucket.download("checkpoints/records", str(tmp_path / "back"))
    assert (tmp_path / "back" / "metrics.jsonl").read_bytes() == b"{}"
    bucket.download("nothing", str(tmp_path / "empty"))
    assert [*(tmp_path / "empty").iterdir()] == []
    if kind == "gs":
        missing = open_bucket("gs://other/runs/mine", gcloud, Calls("mine", "a-project"))
        assert missing.read("launch.json") is None
        with pytest.raises(UserError, match=r"gs://other/runs/mine/launch.json cannot be written: .*not found"):
            missing.write("launch.json", b"")
