"""Figures from a compiled module (time, memory, communication, warnings) and how they are printed."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from pretrain_xla.config import RunConfig
from pretrain_xla.model.flops import flops_per_token
from pretrain_xla.preflight.collectives import find_collectives, group_size, transfer_seconds
from pretrain_xla.preflight.compile_result import CompileResult
from pretrain_xla.preflight.estimate import estimate_step, kernel_time
from pretrain_xla.preflight.health import Finding, config_findings
from pretrain_xla.preflight.hlo import Module
from pretrain_xla.preflight.out_of_memory import is_out_of_memory, read_shortage
from pretrain_xla.preflight.render import duration, render, size
from pretrain_xla.preflight.report import Report, make_report
from pretrain_xla.preflight.topology import resolve_topology
from pretrain_xla.runtime.chips import CHIPS, GIB
from tests.preflight.conftest import MODULE, ONE_BUFFER, OUT_OF_MEMORY, make_config

V5E_8 = resolve_topology("v5e-8")
MakeResult = Callable[..., CompileResult]


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_kernel_takes_the_larger_of_its_operations_and_its_bytes() -> None:
    chip = CHIPS["v5e"]
    assert kernel_time(197e9 * chip.matmul_fraction, 1, chip) == pytest.approx(1e-3)
    assert kernel_time(1, 819e6, chip) == pytest.approx(1e-3)


def test_both_estimates(config: RunConfig) -> None:
    module = Module(MODULE)
    collectives = find_collectives(module, V5E_8)
    estimate = estimate_step(config, module, collectives, V5E_8)
    assert estimate.cycles == 27_800
    assert estimate.cycle_seconds == pytest.approx(27_800 / 1.5e9)
    assert (estimate.kernels, estimate.kernels_without_cost) == (1, 0)
    assert estimate.kernel_seconds == pytest.approx(1.97e9 / (197e12 * 0.88))
    # Twelve iterations of the loop, two products after it, and the kernel's own FLOPs.
    assert estimate.flops == 14 * 2 * 1024 * 256 * 512 + 1.97e9
    by_hand = estimate.cycle_seconds + estimate.kernel_seconds + estimate.exposed_seconds
    assert estimate.conservative.seconds == pytest.approx(max(by_hand, estimate.bytes_seconds))
    slowest = max(estimate.flops_seconds, estimate.bytes_seconds, estimate.communication_seconds)
    assert estimate.optimistic.seconds == pytest.approx(slowest)
    assert estimate.optimistic.seconds <= estimate.conservative.seconds
    rate = config.tokens_per_step / estimate.conservative.seconds
    assert estimate.conservative.tokens_per_second == pytest.approx(rate)
    assert estimate.conservative.tokens_per_second_per_chip == pytest.approx(rate / 8)
    assert estimate.conservative.mfu == pytest.approx(rate * flops_per_token(config.model) / (8 * 197e12))


def test_operations_are_named_by_source_line_and_sorted(config: RunConfig) -> None:
    operations = estimate_step(config, Module(MODULE), (), V5E_8).operations
    rows = {row.where: row for row in operations}
    query = rows["blocks.*.attention.query~ model/layers.py:26"]
    assert (query.count, query.what) == (13, "matrix product bf16[1024,512]")
    assert rows["blocks.*.attention model/attention.py:190"].what.startswith("kernel")
    assert [row.seconds for row in operations] == sorted((row.seconds for row in operations), reverse=True)


def test_a_v3_chip_is_two_devices(config: RunConfig) -> None:
    topology = resolve_topology("v3-8")
    estimate = estimate_step(config, Module(MODULE), (), topology)
    conservative = estimate.conservative
    assert conservative.tokens_per_second_per_chip == pytest.approx(conservative.tokens_per_second / 4)


def test_collectives_and_what_hides_them() -> None:
    gather, reduce = sorted(find_collectives(Module(MODULE), V5E_8), key=lambda row: row.kind)
    assert (gather.kind, gather.group, gather.count, gather.bytes) == ("all-gather", 4, 1, 1024 * 2048 * 2)
    assert gather.exposed == gather.seconds > 0
    assert (reduce.kind, reduce.group, reduce.bytes, reduce.dtypes) == ("all-reduce", 8, 4 * 2**20 // 2, ("f32",))
    assert reduce.exposed == pytest.approx(reduce.seconds - 15_000 / 1.5e9)


CHAIN = """\
HloModule train_step, is_scheduled=true

%start (a: f32[512,512]) -> f32[512,512] {
  %a = f32[512,512]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[512,512]{1,0:T(8,128)} all-reduce(%a), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add
}

%overlapped (b: f32[512,512]) -> f32[512,512] {
  %b = f32[512,512]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.2 = f32[512,512]{1,0:T(8,128)} all-reduce(%b), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add
}

%done (c: f32[512,512]) -> f32[512,512] {
  %c = f32[512,512]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.3 = f32[512,512]{1,0:T(8,128)} all-reduce(%c), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: f32[512,512]) -> f32[512,512] {
  %x = f32[512,512]{1,0:T(8,128)} parameter(0)
  %async-collective-start = f32[512,512]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%start
  %fusion.1 = f32[512,512]{1,0:T(8,128)} fusion(%async-collective-start), kind=kOutput, calls=%overlapped, \
backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %async-collective-done = f32[512,512]{1,0:T(8,128)} fusion(%fusion.1), kind=kCustom, calls=%done
  ROOT %all-reduce.4 = f32[512,512]{1,0:T(8,128)} all-reduce(%x), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


@pytest.mark.parametrize(("cycles", "hidden"), [(15_000, 10e-6), (1_500_000, 1.0)])
def test_a_collective_in_a_chain_of_fusions_is_one(cycles: int, hidden: float) -> None:
    (row,) = find_collectives(Module(CHAIN.replace("CYCLES", str(cycles))), V5E_8)
    each = transfer_seconds("all-reduce", 8, 2**20, V5E_8)
    assert (row.count, row.bytes) == (2, 2 * 2**20)
    assert row.seconds == pytest.approx(2 * each)
    # The fusion that overlaps the first collective hides up to its own time; nothing hides the second.
    assert row.exposed == pytest.approx(2 * each - min(each, hidden))


def test_time_on_the_interconnect() -> None:
    # Two of four links at a corner of 2x4: 90 GB/s.
    assert transfer_seconds("all-reduce", 8, 400_000_000, V5E_8) == pytest.approx(2 * 7 / 8 * 4e8 / 90e9)
    assert transfer_seconds("all-gather", 8, 400_000_000, V5E_8) == pytest.approx(7 / 8 * 4e8 / 90e9)
    # One of them along the longer side.
    assert transfer_seconds("all-gather", 4, 400_000_000, V5E_8) == pytest.approx(3 / 4 * 4e8 / 45e9)
    assert transfer_seconds("all-reduce", 1, 400_000_000, V5E_8) == 0
    assert transfer_seconds("all-reduce", 2, 400_000_000, resolve_topology("v3-8")) == 0  # two cores of one chip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("replica_groups=[2,4]<=[8]", 4), ("replica_groups={{0,1},{2,3}}", 2), ("replica_groups={}", 8), ("", 8)],
)
def test_group_sizes(text: str, expected: int) -> None:
    assert group_size(text, 8) == expected


def test_the_compilers_out_of_memory_error_is_parsed() -> None:
    assert is_out_of_memory(OUT_OF_MEMORY)
    shortage = read_shortage(OUT_OF_MEMORY, 1)
    assert shortage.needed == pytest.approx(17.52 * GIB)
    assert shortage.limit == pytest.approx(15.75 * GIB)
    first, second = shortage.largest
    assert (first.bytes, first.unpadded_bytes, first.kind) == (8 * GIB, 6 * GIB, "HLO temp")
    assert first.where.startswith("blocks.0.attention in model/attention.py_39")
    assert (second.bytes, second.where) == (GIB // 2, "")


def test_the_error_about_a_single_buffer_is_parsed() -> None:
    assert is_out_of_memory(ONE_BUFFER)
    shortage = read_shortage(ONE_BUFFER, 15 * GIB)
    assert (shortage.needed, shortage.limit) == (64 * GIB, 15 * GIB)
    assert shortage.largest[0].shape.startswith("bf16[1048576,32768]")


def test_an_unknown_wording_still_means_out_of_memory() -> None:
    message = "RESOURCE_EXHAUSTED: hbm is full, in words not seen before"
    assert is_out_of_memory(message)
    assert read_shortage(message, 5).largest == ()
    assert not is_out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel")


def test_report_of_what_fits(config: RunConfig, make_result: MakeResult) -> None:
    report = make_report(config, V5E_8, make_result(), price_per_chip_hour=1.5)
    assert report.fits
    assert report.memory.padding == 6 * 2**20
    assert report.memory.total == (100 + 90 - 90 + 400 + 10) * 2**20
    assert report.run is not None
    assert report.run.dollars_conservative == pytest.approx(report.run.hours_conservative * 8 * 1.5)
    text = printed(report)
    for part in (
        "FITS: 510.00 MiB of 15.75 GiB",
        "optimistic",
        "blocks.*.attention.query~ model/layers.py:26",
        "all-reduce",
    ):
        assert part in text
    tree = json.loads(json.dumps(report.to_tree()))
    assert tree["fits"] is True
    assert tree["estimate"]["sober"] == tree["estimate"]["conservative"], "its name in older reports"
    assert (
        tree["run"]["hours_sober"] == tree["run"]["hours_conservative"] == pytest.approx(report.run.hours_conservative)
    )


def test_report_of_what_does_not_fit(config: RunConfig, make_result: MakeResult) -> None:
    report = make_report(config, V5E_8, make_result(read_shortage(OUT_OF_MEMORY, 1)), None)
    assert not report.fits
    assert report.estimate is None
    text = printed(report)
    for part in (
        "DOES NOT FIT: needs at least 17.52 GiB of 15.75 GiB",
        "blocks.*.attention model/attention.py:39",
        "8.00 GiB",
    ):
        assert part in text
    assert json.loads(json.dumps(report.to_tree()))["fits"] is False


def test_results_survive_json(make_result: MakeResult) -> None:
    for result in (make_result(), make_result(read_shortage(OUT_OF_MEMORY, 1))):
        assert CompileResult.from_tree(json.loads(json.dumps(result.to_tree()))) == result


def test_state_that_is_not_donated_is_a_warning(config: RunConfig, make_result: MakeResult) -> None:
    good = make_result()
    copied = dataclasses.replace(good.inputs[0], aliased=False)
    report = make_report(config, V5E_8, dataclasses.replace(good, inputs=(copied, *good.inputs[1:])), None)
    assert any(
        f.level == "warning" and "held twice" in f.text and "embedding.weight" in f.text for f in report.findings
    )
    assert not any("held twice" in f.text for f in make_report(config, V5E_8, good, None).findings)


def test_state_that_the_mesh_does_not_shard_is_a_warning(config: RunConfig, make_result: MakeResult) -> None:
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    findings = make_report(config, V5E_8, make_result(mesh=mesh), None).findings
    assert any("whole on every device" in finding.text for finding in findings)


def test_host_transfers_and_fp32_products_are_warnings(config: RunConfig, make_result: MakeResult) -> None:
    result = make_result()
    assert result.compiled is not None
    text = MODULE.replace("custom-call(%tokens)", "outfeed(%tokens)").replace(
        "bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)", "f32[1024,256]{1,0:T(8,128)} parameter(0)"
    )
    text = text.replace("%b = bf16[256,512]", "%b = f32[256,512]")
    result = dataclasses.replace(result, compiled=dataclasses.replace(result.compiled, hlo_text=text))
    findings = [finding.text for finding in make_report(config, V5E_8, result, None).findings]
    assert any("transfers between host and device" in finding for finding in findings)
    assert any("matrix arithmetic is in fp32" in finding and "model/layers.py:26" in finding for finding in findings)


def test_a_step_that_barely_fits_is_a_warning(config: RunConfig, make_result: MakeResult) -> None:
    result = make_result()
    assert result.compiled is not None
    full = dataclasses.replace(result.compiled, temp_bytes=int(15.6 * GIB))
    findings = make_report(config, V5E_8, dataclasses.replace(result, compiled=full), None).findings
    assert any("edge" in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"num_heads": 2}}, "heads of width 64 leave 50%"),
        ({"model": {"vocab_size": 500}}, "padded to 512 rows"),
        ({"model": {"vocab_size": 500, "vocab_multiple": 1}}, "not a multiple of 128"),
        ({"model": {"d_ff": 200}}, "d_ff=200"),
        ({"train": {"mixed_precision": None}}, "computing in fp32"),
    ],
)
def test_wasteful_shapes(sections: dict[str, dict[str, object]], expected: str) -> None:
    assert any(expected in finding.text for finding in config_findings(make_config(**sections), "v5e"))
    assert not any(expected in finding.text for finding in config_findings(make_config(), "v5e"))


def test_units() -> None:
    assert [size(10), size(2**20), size(3 * GIB)] == ["10 B", "1.00 MiB", "3.00 GiB"]
    assert [duration(2e-5), duration(0.0685), duration(3.0), duration(600)] == ["20 µs", "68.5 ms", "3.00 s", "10 min"]


def test_an_involuntary_rematerialization_is_a_warning(
    config: RunConfig, make_result: Callable[..., CompileResult]
) -> None:
    warning = "the compiler finds no direct way"
    result = CompileResult.from_tree(make_result(detours=warning).to_tree())
    assert Finding("warning", warning) in make_report(config, V5E_8, result, None).findings
