"""Which machine this is, by its bus and its environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import build_config
from pretrain_xla.doctor.client import environment
from pretrain_xla.doctor.examination import Machine, this_machine
from pretrain_xla.preflight.report import Report
from pretrain_xla.runtime import tpu_chip
from tests.doctor.test_record import report

V5E_ON_PCI = "0x0063"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns this machine for a number of v5e chips on its bus, variables and settings of the run."""

    def look(chips: int = 0, variables: dict[str, str] | None = None, **parallel: str) -> Machine:
        for name in ("PJRT_DEVICE", "TPU_ACCELERATOR_TYPE", "CPU_NUM_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TPU_SKIP_MDS_QUERY": "1", **(variables or {})}.items():
            monkeypatch.setenv(name, value)
        bus = tmp_path / str(chips)
        for number in range(chips):
            (bus / str(number)).mkdir(parents=True, exist_ok=True)
            (bus / str(number) / "vendor").write_text(tpu_chip.GOOGLE)
            (bus / str(number) / "device").write_text(V5E_ON_PCI)
        monkeypatch.setattr(tpu_chip, "PCI_DEVICES", bus)
        return this_machine(build_config({"parallel": parallel}, "test"))

    return look


def test_a_host_of_a_slice(machine: Any) -> None:
    found = machine(4, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"})
    assert (found.kind, found.name, found.chips_on_bus) == ("TPU", "v5e", 4)
    assert found.own is found.topology
    assert found.own.libtpu_name == "v5e:2x4"
    assert "CPU_NUM_DEVICES" not in environment("devices")
    named = machine(4, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, topology="v6e-8")
    assert (named.own.libtpu_name, named.topology.libtpu_name) == ("v5e:2x4", "v6e:2x4")
    unknown = machine(4, {"TPU_ACCELERATOR_TYPE": "v5litepod-3"})
    assert (unknown.name, unknown.own) == ("v5e", None)


def test_a_cpu_and_a_tpu_that_is_hidden(machine: Any) -> None:
    assert machine() == Machine("CPU", "cpu", None, None, None, 0)
    assert environment("devices")["CPU_NUM_DEVICES"] == "4"
    assert "CPU_NUM_DEVICES" not in environment("steps")
    hidden = machine(8, {"PJRT_DEVICE": "CPU"})
    assert (hidden.kind, hidden.chips_on_bus, hidden.own) == ("CPU", 8, None)
    assert machine(runtime="torch", topology="v5e-1").topology.devices == 1


def test_a_ratio_is_of_the_same_slice_only(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate: Report = report(None)  # for v5e-8
    own = machine(4, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"})
    others = [machine(4, {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}), machine()]
    eight, four = ({"device_count": count} for count in (8, 4))
    assert Machine(**(vars(own) | eight)).is_of(estimate)
    assert not Machine(**(vars(own) | four)).is_of(estimate)
    assert not Machine(**(vars(own) | eight)).is_of(None)
    assert not any(Machine(**(vars(one) | eight)).is_of(estimate) for one in others)
