"""A bucket that holds the data and the checkpoints of a run stops answering for a while.

`BUCKET_OUTAGE=60 pytest tests/faults/test_bucket.py` makes it a minute of status 503, with the limits that a run has.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.metrics import MetricLog, read_metrics
from pretrain_xla.storage import retries
from pretrain_xla.train.run import run

from ..servers import FaultyProxy, gcs_emulator, upload
from ..small_run import make_config, one_thread, runtime, tokens

__all__ = ["make_config", "one_thread", "runtime", "tokens"]

MINUTE = "BUCKET_OUTAGE" in os.environ
SECONDS = float(os.environ.get("BUCKET_OUTAGE", "1.5"))
STATUS = "503" if MINUTE else "425"
"""gcsfs repeats a request with status 503 for half a minute by itself, and one with 425 not at all."""
STEPS, REFUSES, SILENT = 25, 10, 20
"""Steps of the run; after which the bucket refuses a write, and after which it answers nothing for a while."""


class Outages:
    """What the proxy in front of the bucket is told, by the step whose metrics are written."""

    def __init__(self, proxy: FaultyProxy) -> None:
        self._proxy, self._refused, self.silent_from = proxy, 0, 0.0
        proxy.faulty, proxy.fault = {"POST"}, self._fault

    def at(self, step: int) -> None:
        if step == REFUSES and not MINUTE:
            self._refused = 1
        elif step == SILENT and not self.silent_from:
            self.silent_from = time.monotonic()
            self._proxy.faulty = {"GET", "POST", "PUT", "DELETE"}

    def _fault(self, _path: str, _span: str | None) -> str | None:
        if self.silent_from:
            return STATUS if time.monotonic() - self.silent_from < SECONDS else None
        self._refused -= 1
        return STATUS if self._refused >= 0 else None


@pytest.mark.usefixtures("runtime")
def test_an_outage_costs_time_and_a_checkpoint(
    make_config: Callable[..., RunConfig],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {
        "train": {"train_steps": STEPS, "valid_steps": 1, "train_batch_size": 4, "eval_batch_size": 4},
        "checkpoint": {"save_interval": 5, "saved_checkpoint_limit": 99},
    }
    undisturbed, disturbed = (
        {"run_dir": str(tmp_path / name), "log_interval": 1, "tensorboard": False} for name in "ab"
    )
    run(make_config(**changes, logging=undisturbed))
    if not MINUTE:
        monkeypatch.setattr(retries, "RETRY_LIMITS", retries.RetryLimits(1.0, 20.0, 0.05, 0.2, 0.3))
        monkeypatch.setattr("pretrain_xla.run_folder.checkpoint.RETRY", 0.0)
    write = MetricLog.write
    with gcs_emulator() as address, FaultyProxy(address) as proxy:
        outages = Outages(proxy)

        def write_and_tell(log: MetricLog, rows: list[dict[str, float]], *, kind: str) -> None:
            write(log, rows, kind=kind)
            outages.at(int(rows[-1]["step"]))

        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": proxy.address})
        monkeypatch.setattr(MetricLog, "write", write_and_tell)
        root = upload(address, tokens, "data")
        changes["data"] = {"train_dir": f"{root}/train", "valid_dir": f"{root}/valid", "remote_reads": "ranged"}
        changes["checkpoint"] |= {"checkpoints_dir": f"{root}/checkpoints"}
        run(make_config(**changes, logging=disturbed))
        assert time.monotonic() - outages.silent_from > SECONDS
        steps = CheckpointStore(f"{root}/checkpoints", 1).steps()
    said = " ".join(capfd.readouterr().out.split())
    refused = (
        r"the checkpoint of step \d+ could not be written \(not now, 425\); earlier ones are complete: training goes on"
    )
    assert MINUTE or re.search(refused, said)
    assert STEPS in steps
    logged = [read_metrics(str(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in logged]
    assert len(losses[0]) == STEPS
    assert losses[1] == losses[0]
