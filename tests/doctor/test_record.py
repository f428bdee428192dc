"""What is written of a check-up, and what preflight makes of it: with the file and without, damaged, or another chip's."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain_xla.config import RunConfig
from pretrain_xla.doctor.check import Check, failed
from pretrain_xla.doctor.record import calibration_of
from pretrain_xla.doctor.verdicts import judge_collective, judge_devices, judge_matmul, judge_steps, judge_stream
from pretrain_xla.errors import UserError
from pretrain_xla.preflight.calibration import Calibration, calibration_path, read_calibration, write_calibration
from pretrain_xla.preflight.compile_result import Compiled, CompileResult
from pretrain_xla.preflight.render import render
from pretrain_xla.preflight.report import Report, make_report
from pretrain_xla.preflight.trials import Compiler
from pretrain_xla.storage.checked_json import with_checksum
from tests.doctor.conftest import V5E, V5E_8, collective, devices, rates, steps
from tests.preflight.conftest import MODULE, make_config

SOFTWARE = {"python": "3.11.7", "torch_xla": "2.9.0", "libtpu": "0.0.21"}
CONFIG = make_config()


def report(folder: Path | None, config: RunConfig = CONFIG) -> Report:
    """Preflight's report on a compiled step."""
    mib = 2**20
    compiled = Compiled(MODULE, 1e9, 1e9, 100 * mib, 90 * mib, 90 * mib, 400 * mib, 10 * mib, 12.0)
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    result = CompileResult(compiled, None, (), mesh, 1.0, 12.0, "0.0.21")
    return make_report(config, V5E_8, result, 1.5, None if folder is None else str(folder))


def checks(ratio: float | None = None) -> list[Check]:
    """Of a healthy v5e-8; with a ratio, its steps too, which take so many times preflight's conservative estimate."""
    found = [
        judge_devices(devices(), V5E, V5E_8, 8),
        Check("hosts", "ok", "alone", figures={"machines": 1}),
        judge_matmul(rates(V5E.peak_flops), V5E.peak_flops),
        judge_stream(rates(V5E.hbm_bandwidth), V5E.hbm_bandwidth),
        judge_collective("all-reduce", collective(), V5E_8),
    ]
    plain = report(None)
    if ratio is not None and plain.estimate is not None:
        seconds = ratio * plain.estimate.conservative.seconds
        found.append(judge_steps(steps(step_seconds=seconds), plain, same_chip=True))
    return found


def record(found: list[Check], earlier: Calibration | None = None) -> Calibration | None:
    return calibration_of(found, chip="v5e", software=SOFTWARE, config=CONFIG, same_chip=True, earlier=earlier)


def printed(found: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_preflight_scales_its_estimate_by_what_was_measured(tmp_path: Path) -> None:
    plain = report(tmp_path)  # nothing there yet
    assert plain.calibrated is None
    assert "measure" not in printed(plain)
    assert plain.estimate is not None
    assert plain.run is not None
    conservative = plain.estimate.conservative.seconds
    made = record(checks(1.25))
    assert made is not None
    path = write_calibration(tmp_path, made)
    assert path == tmp_path / "v5e.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as after a mail
    assert read_calibration(tmp_path, "v5e") == made

    scaled = report(tmp_path)
    assert scaled.estimate == plain.estimate
    assert scaled.calibrated is not None
    assert scaled.calibrated.ratio == pytest.approx(1.25)
    assert scaled.calibrated.speed.seconds == pytest.approx(1.25 * conservative)
    assert scaled.calibrated.hours == pytest.approx(1.25 * plain.run.hours_conservative)
    assert scaled.calibrated.dollars == pytest.approx(1.25 * (plain.run.dollars_conservative or 0))
    text = printed(scaled)
    assert "conservative x 1.25, as measured" in text
    assert f"{made.measured:%Y-%m-%d}" in text
    assert str(path) in text
    assert "124.0M parameters on v5e-8 (8 devices; torch_xla 2.9.0, libtpu 0.0.21)" in text
    tree = json.loads(json.dumps(scaled.to_tree()))
    assert tree["calibrated"]["file"] == str(path)
    assert json.loads(json.dumps(plain.to_tree()))["calibrated"] is None
    assert report(None).calibrated is None


def test_rates_alone_give_no_ratio_and_keep_an_earlier_one(tmp_path: Path) -> None:
    first = record(checks(1.1))
    later = record(checks(), earlier=first)
    assert first is not None
    assert later is not None
    assert first.step is not None
    assert later.step == first.step
    only = record(checks())
    assert only is not None
    assert only.step is None
    write_calibration(tmp_path, only)
    assert report(tmp_path).calibrated is None


@pytest.mark.parametrize(
    "bad",
    [failed("matmul", "wrong", "restart"), failed("all-reduce", "wrong", "restart"), failed("30 steps", "NaN", "see")],
)
def test_a_sick_machine_is_not_recorded(bad: Check) -> None:
    assert record([check for check in checks() if check.name != bad.name] + [bad]) is None
    assert record([failed("storage gs://b", "slow", "choose"), *checks()]) is not None


def test_a_step_far_from_the_estimate_fails_only_on_the_same_chip() -> None:
    slow = judge_steps(steps(step_seconds=50.0), report(None), same_chip=True)
    assert slow.status == "failed"
    assert "measured / conservative =" in slow.expected
    assert "send us the calibration file" in slow.fix
    assert judge_steps(steps(step_seconds=50.0), report(None), same_chip=False).status == "ok"


def test_the_file_names_nothing_of_where_it_was_made() -> None:
    made = record(checks(1.1))
    assert made is not None
    text = made.model_dump_json()
    for secret in (os.uname().nodename, str(Path.home()), CONFIG.data.train_dir):
        assert secret not in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tree: with_checksum(tree)[:-20], "cut off"),
        (lambda tree: with_checksum(tree).replace(b'"devices": 8', b'"devices": 9', 1), "its checksum differs"),
        (lambda tree: with_checksum(tree | {"version": 2}), "version: Input should be 1"),
        (lambda tree: with_checksum(tree | {"chip": "v6e"}), "it is of v6e, and not of v5e"),
        (lambda tree: with_checksum(tree | {"step": tree["step"] | {"ratio": -1}}), "step.ratio"),
        (lambda tree: with_checksum(tree | {"device": "x\x1b[31m"}), "device"),
        (lambda tree: b"{" + b" " * 2**21 + b"}", "too large"),
    ],
)
def test_a_damaged_or_hostile_file_is_one_line(damage: Any, words: str, tmp_path: Path) -> None:
    made = record(checks(1.1))
    assert made is not None
    calibration_path(tmp_path, "v5e").write_bytes(damage(made.model_dump(mode="json")))
    with pytest.raises(UserError) as caught:
        Compiler(V5E_8, calibration=str(tmp_path))  # before anything is compiled
    assert words in str(caught.value)
    assert str(tmp_path / "v5e.json") in str(caught.value)
    assert "doctor" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    made = record(checks())
    assert made is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder with --calibration"):
        write_calibration(tmp_path / "file" / "below", made)
