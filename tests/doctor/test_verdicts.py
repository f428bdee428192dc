"""Each check of the devices, well and failing, by the figures of a TPU; a failed one says what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain_xla.doctor.agreement import check_hosts, local_facts
from pretrain_xla.doctor.check import Check
from pretrain_xla.doctor.client import Answer
from pretrain_xla.doctor.examination import Machine, device_checks
from pretrain_xla.doctor.verdicts import (
    judge_collective,
    judge_devices,
    judge_kernels,
    judge_matmul,
    judge_steps,
    judge_stream,
)
from pretrain_xla.preflight.collectives import transfer_seconds
from pretrain_xla.runtime.chips import GIB
from tests.doctor.conftest import V5E, V5E_8, collective, devices, kernels, rates, steps

PEAK, BANDWIDTH = V5E.peak_flops, V5E.hbm_bandwidth
ON_TPU = Machine("TPU", "v5e", V5E, V5E_8, V5E_8, 8, 8)
WORDS = {"torch": "2.9.0", "torch_xla": "2.9.0"}


def facts(**changes: Any) -> dict[str, Any]:
    return (
        local_facts(WORDS | changes.pop("versions", {}), changes.pop("failed", []), chip="v5e", local_devices=4)
        | changes
    )


WELL = [
    judge_devices(devices(), V5E, V5E_8, 8),
    judge_devices(devices(kind="CPU", name="CPU", count=4, hbm_used=[], hbm_total=[]), None, None, 0),
    judge_kernels(kernels()),
    judge_matmul(rates(PEAK), PEAK),
    judge_matmul(rates(1e9), None),
    judge_stream(rates(BANDWIDTH), BANDWIDTH),
    judge_collective("all-reduce", collective(), V5E_8),
    judge_collective("all-reduce", collective(), None),
    judge_steps(steps(), None, False),
    check_hosts([facts(), facts()], 2),
    check_hosts([facts()], 1),
]

# (the check, words of what it found, words of what to do)
ILL = [
    (judge_devices(devices(count=4), V5E, V5E_8, 4), "4 TPU devices", "every host"),
    (
        judge_devices(devices(hbm_total=[V5E.usable_hbm] * 7 + [8 * GIB]), V5E, V5E_8, 8),
        "a device has 8.00 GiB",
        "restart",
    ),
    (judge_devices(devices(hbm_used=[0] * 7 + [9 * GIB]), V5E, V5E_8, 8), "57% of it is in use", "lsof"),
    (
        judge_devices(devices(kind="CPU", name="CPU", hbm_used=[], hbm_total=[]), None, None, 4),
        "not used",
        "PJRT_DEVICE",
    ),
    (judge_kernels(kernels(result=0.3)), "3.0e-01 of its largest value (result) on device 1", "--attention reference"),
    (judge_kernels(kernels(result=math.nan)), "nan", "--attention reference"),
    (judge_matmul(rates(PEAK, 0.3), PEAK), "30%", "lsof"),
    (judge_matmul(rates(PEAK, 1.5), PEAK), "150%", "TPU_ACCELERATOR_TYPE"),
    (judge_matmul(rates(PEAK, errors=[0.1, 2.0, math.nan]), PEAK), "wrong results on device 1, 2", "must not train"),
    (judge_stream(rates(BANDWIDTH, 0.2), BANDWIDTH), "20%", "lsof"),
    (judge_stream(rates(BANDWIDTH, errors=[0, 1]), None), "wrong results on device 1", "must not train"),
    (judge_collective("all-to-all", collective(seconds=1.0), V5E_8), "0%", "given back"),
    (judge_collective("all-gather", collective(errors=[3.0]), None), "wrong results", "must not train"),
    (judge_steps(steps(losses=[10.0, None]), None, False), "not finite", "--max-grad-norm"),
    (judge_steps(steps(graph_events=["recompilation at a.py:3"]), None, False), "a.py:3", "--strict-graph"),
    (
        check_hosts([facts(), facts(), facts(versions={"torch_xla": "2.8.1"})], 3),
        "process 2 has torch_xla 2.8.1, and most have 2.9.0",
        "alike",
    ),
    (check_hosts([facts(), facts(failed=["storage ."])], 2), "process 1 fails storage .", "own output"),
    (check_hosts([facts(), facts(), facts(chip="v6e")], 3), "process 2 has chip v6e", "alike"),
]


@pytest.mark.parametrize("check", WELL, ids=lambda check: check.name)
def test_a_healthy_machine(check: Check) -> None:
    assert check.status == "ok", check


@pytest.mark.parametrize(
    ("check", "found", "fix"), ILL, ids=[f"{number}-{row[0].name}" for number, row in enumerate(ILL)]
)
def test_each_check_can_fail_and_says_what_to_do(check: Check, found: str, fix: str) -> None:
    assert check.status == "failed"
    assert found in check.found
    assert fix in check.fix


def test_the_share_is_of_the_chip_table() -> None:
    assert "85%" in judge_matmul(rates(PEAK), PEAK).found
    assert judge_matmul(rates(PEAK), PEAK).expected == "197 TFLOP/s"
    assert judge_stream(rates(BANDWIDTH), BANDWIDTH).expected == "819 GB/s"
    check = judge_collective("all-reduce", collective(), V5E_8)
    assert check.figures["table_seconds"] == transfer_seconds("all-reduce", 8, 2**26, V5E_8)
    assert f"{check.figures['table_seconds'] / 1.5e-3:.0%}" in check.found
    scatter = judge_collective("reduce-scatter", collective(), V5E_8)  # the TPU compiler makes an all-reduce of it
    assert scatter.figures["table_seconds"] == check.figures["table_seconds"]


def answer(**changes: Any) -> Answer:
    hosts = {"facts": [facts()], "machines": 1, "index": 0}
    figures = {
        "start": {},
        "hosts": hosts,
        "devices": devices(),
        "kernels": kernels(),
        "matmul": rates(PEAK),
        "stream": rates(BANDWIDTH),
    }
    figures |= {kind: collective() for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")}
    whole: dict[str, Any] = {"figures": figures | {"collective-permute": collective()}, "errors": {}, "broken": None}
    return Answer(**(whole | changes))


def test_a_process_that_comes_to_its_end_gives_one_check_for_each_stage() -> None:
    checks = device_checks(answer(), ON_TPU)
    assert [check.status for check in checks] == ["ok"] * 10
    whole = answer().figures
    torch_only = {stage: whole[stage] for stage in ("start", "hosts", "devices", "kernels", "matmul", "stream")}
    checks = device_checks(answer(figures=torch_only), ON_TPU)
    assert [check.status for check in checks] == ["ok"] * 5 + ["skipped"]
    assert "--runtime torch" in checks[-1].fix


@pytest.mark.parametrize(
    ("figures", "errors", "broken", "expected"),
    [
        ({}, {}, ("start", "status -11: undefined symbol"), ("start", "undefined symbol", "import torch_xla")),
        ({"start": 0}, {"hosts": "process 1 did not come"}, None, ("hosts", "did not come", "--worker=all")),
        ({"start": 0, "hosts": 0}, {"devices": "TPU in use by 77"}, None, ("devices", "in use by 77", "lsof")),
        (
            {"start": 0, "hosts": 0, "devices": 0},
            {"kernels": "Mosaic failed"},
            None,
            ("kernels", "Mosaic", "--attention reference"),
        ),
        (
            {"start": 0, "hosts": 0, "devices": 0},
            {},
            ("matmul", "nothing came for 9 s"),
            ("matmul", "for 9 s", "restart the VM"),
        ),
    ],
)
def test_a_process_that_dies_or_hangs_fails_where_it_was(
    figures: dict[str, Any], errors: dict[str, str], broken: tuple[str, str] | None, expected: tuple[str, str, str]
) -> None:
    there = {stage: answer().figures[stage] for stage in figures}
    checks = device_checks(answer(figures=there, errors=errors, broken=broken), ON_TPU)
    (bad,) = (check for check in checks if check.status == "failed")
    name, found, fix = expected
    assert bad.name == name
    assert found in bad.found
    assert fix in bad.fix
    assert {check.status for check in checks if check is not bad} <= {"ok", "skipped"}
    assert len({check.name for check in checks}) == len(checks)
