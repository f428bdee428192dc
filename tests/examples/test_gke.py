"""The JobSet for GKE, its page and the table of slices say the same: hosts, chips, node selectors, flags."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from pretrain_xla.config import RunConfig
from pretrain_xla.flags import parse_flags
from pretrain_xla.launch.slices import resolve_slice
from pretrain_xla.preflight.topology import Topology, resolve_topology
from pretrain_xla.runtime.chips import generation

from ..end_to_end.conftest import ROOT

FOLDER = ROOT / "examples" / "gke"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (v\S+) \| (\S+) \| (\S+) \| (\S+) \| (\d+) \|$", PAGE, re.MULTILINE)
CHIPS_OF_HOST = 4
"""Chips of a host in a slice of several hosts, on every generation that GKE has."""


@pytest.fixture
def jobset() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((FOLDER / "jobset.yaml").read_text(encoding="utf-8"))
    return tree


def slice_of(accelerator: str, shape: str) -> Topology:
    return resolve_topology(f"{generation(accelerator)}:{shape}")


def test_hosts_and_chips_are_those_of_the_slice(jobset: dict[str, Any]) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    accelerator, shape = (pod["nodeSelector"][f"cloud.google.com/gke-tpu-{key}"] for key in ("accelerator", "topology"))
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": CHIPS_OF_HOST}
    hosts = slice_of(accelerator, shape).chips // CHIPS_OF_HOST
    assert spec["parallelism"] == spec["completions"] == hosts
    assert spec["completionMode"] == "Indexed"
    assert (accelerator, shape, str(hosts)) in [(row[1], row[2], row[4]) for row in ROWS]
    assert spec["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"


def test_an_error_to_be_fixed_ends_it_and_all_else_starts_again(jobset: dict[str, Any]) -> None:
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}


def test_its_flags_are_a_run_that_the_slice_can_do(jobset: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    python, script, *flags = pod["containers"][0]["command"]
    assert (python, script) == ("python", "run_pretrain_xla.py")
    config: RunConfig = parse_flags(flags, program=script, description="").config
    plain: RunConfig = parse_flags(["--config", "configs/modern_124m.yaml"], program=script, description="").config
    assert config.tokens_per_step == plain.tokens_per_step
    valid = config.train.valid_steps * config.train.eval_batch_size
    assert valid == plain.train.valid_steps * plain.train.eval_batch_size
    selector = pod["nodeSelector"]
    devices = slice_of(*(selector[f"cloud.google.com/gke-tpu-{key}"] for key in ("accelerator", "topology"))).devices
    assert config.train.train_batch_size % devices == config.train.eval_batch_size % devices == 0
    assert config.checkpoints_dir.startswith("gs://")  # all hosts see it, and it outlives them
    assert "://" not in config.run_dir


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_table_is_that_of_preflight_and_launch(row: tuple[str, ...]) -> None:
    kind, accelerator, shape, machine, hosts = row
    expected = resolve_topology(kind)
    assert slice_of(accelerator, shape).libtpu_name == expected.libtpu_name
    assert int(hosts) == expected.chips // CHIPS_OF_HOST == resolve_slice(kind).hosts
    assert machine.endswith(f"-{CHIPS_OF_HOST}t")
    assert machine.startswith({"v4": "ct4p", "v5e": "ct5lp", "v5p": "ct5p", "v6e": "ct6e"}[expected.chip.name])


def test_the_page_creates_the_nodes_that_the_jobset_asks_for(jobset: dict[str, Any]) -> None:
    assert len(ROWS) >= 8
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (row,) = (
        row for row in ROWS if row[2] == pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] and "v5" in row[0]
    )
    created = re.search(r"--machine-type=(\S+) --tpu-topology=(\S+) --num-nodes=(\d+)", PAGE)
    assert created
    assert created.groups() == (row[3], row[2], row[4])
    assert pod["containers"][0]["image"] in PAGE
