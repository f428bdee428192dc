"""Parsing the compiler's HLO text: counts, bytes, products, labels."""

from __future__ import annotations

import pytest

from pretrain_xla.preflight.hlo import Array, Instruction, Module, aliased_parameters, arrays, read_label
from pretrain_xla.preflight.traffic import _positions, hbm_bytes, product_flops, products
from tests.preflight.conftest import MODULE


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(MODULE)


@pytest.fixture(scope="module")
def scheduled(module: Module) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in module.scheduled()}


def test_arrays_and_their_memory_spaces() -> None:
    on_chip, in_hbm, scalar = arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0:T(128)}, pred[])")
    assert on_chip == Array("bf16", (8, 128), True, "1,0:T(8,128)(2,1)S(1)")
    assert (on_chip.bytes, on_chip.hbm_bytes) == (2048, 0)
    assert (in_hbm.bytes, in_hbm.hbm_bytes) == (12, 12)
    assert (scalar.bytes, str(in_hbm)) == (1, "f32[3]")


def test_a_loop_counts_once_per_iteration(scheduled: dict[str, Instruction]) -> None:
    assert scheduled["fusion.1"].times == 12
    assert scheduled["slice.1"].times == 1
    assert sum(i.cycles * i.times for i in scheduled.values()) == 12 * 1000 + 500 + 300 + 15000


def test_without_a_trip_count_the_condition_gives_it() -> None:
    text = MODULE.replace("known_trip_count", "other").replace(
        "ROOT %constant.1 = pred[]{:T(128)} constant(true)",
        '%limit = s32[]{:T(128)} constant(7), metadata={op_name="xla__loop"}\n'
        "  %counter = s32[]{:T(128)} get-tuple-element(%carried.1), index=0\n"
        "  ROOT %compare.1 = pred[]{:T(512)} compare(%counter, %limit), direction=LT",
    )
    assert {i.name: i.times for i in Module(text).scheduled()}["fusion.1"] == 7
    assert {i.name: i.times for i in Module(text.replace("%limit = s32", "%limit = u32")).scheduled()}["fusion.1"] == 7
    unrolled = text.replace("tuple(%count, %left, %right)", "tuple(%next, %left, %right)").replace(
        "  ROOT %tuple.1",
        "  %two = s32[]{:T(128)} constant(2)\n  %next = s32[]{:T(128)} add(%count, %two)\n  ROOT %tuple.1",
    )
    assert {i.name: i.times for i in Module(unrolled).scheduled()}["fusion.1"] == 4


def test_loops_of_unknown_length_are_reported() -> None:
    assert not Module(MODULE).unknown_loops()
    unknown = Module(MODULE.replace("known_trip_count", "other")).unknown_loops()
    assert [loop.name for loop in unknown] == ["while"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokens", 0),
        ("copy-start", 256 * 512 * 2),  # read once from HBM, into the chip
        ("copy-done", 0),
        ("slice-start", 16 * 128 * 4),
        ("slice-done", 0),
        ("while", 0),
        ("fusion.1", (1024 * 256 + 1024 * 512) * 2),  # the weight is on the chip
        ("slice.1", 2 * 8 * 128 * 4 + 4),  # the slice, not the array that it is taken from
        ("slice.2", 2 * 8 * 128 * 4 + 4),  # the same in a nested fusion
        ("update.1", 2 * 8 * 128 * 4 + 4),  # the update alone: it is in place
        ("kernel.1", 819000),  # its own cost estimate
        ("all-reduce-done", 0),
    ],
)
def test_hbm_bytes(name: str, expected: int, module: Module, scheduled: dict[str, Instruction]) -> None:
    assert hbm_bytes(module, scheduled[name]) == expected


def test_products_within_fusions(module: Module, scheduled: dict[str, Instruction]) -> None:
    (product,) = products(module, scheduled["fusion.1"])
    assert product_flops(module, product) == 2 * 1024 * 256 * 512
    assert products(module, scheduled["slice.1"]) == []


def test_a_batched_product_as_a_convolution() -> None:
    """libtpu writes a batch of 16 products [128, 64] x [64, 256] as a convolution over a spatial dimension of 16."""
    text = """\
HloModule m, is_scheduled=true

ENTRY %main (a: bf16[16,128,64], b: bf16[16,64,256]) -> bf16[16,128,256] {
  %a = bf16[16,128,64]{2,1,0} parameter(0)
  %b = bf16[16,64,256]{2,1,0} parameter(1)
  ROOT %convolution.1 = bf16[16,128,256]{2,1,0} convolution(%a, %b), \
window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf
}
"""
    module = Module(text)
    (product,) = (i for i in module.scheduled() if i.opcode == "convolution")
    assert product_flops(module, product) == 2 * 16 * 128 * 64 * 256


@pytest.mark.parametrize("left", [1, 3, 8])
@pytest.mark.parametrize("right", [1, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("pad", [-2, 0, 3])
@pytest.mark.parametrize("dilation", [1, 2, 8])
def test_window_positions_match_a_count(left: int, right: int, stride: int, pad: int, dilation: int) -> None:
    result, right_dilation = 6, 2
    positions = [o * stride + w * right_dilation - pad for o in range(result) for w in range(right)]
    counted = sum(0 <= position <= (left - 1) * dilation and position % dilation == 0 for position in positions)
    assert _positions(left, right, result, stride, pad, dilation, right_dilation) == counted


def test_dot() -> None:
    text = """\
HloModule m, is_scheduled=true

ENTRY %main (a: f32[4,8,16], b: f32[4,16,32]) -> f32[4,8,32] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_contracting_dims={1}
}
"""
    module = Module(text)
    (product,) = (i for i in module.scheduled() if i.opcode == "dot")
    assert product_flops(module, product) == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("blocks.3.attention.query in model/layers.py_26.13/aten__mm", "blocks.3.attention.query model/layers.py:26"),
        ("blocks.3.attention~ in model/attention.py_41.44/x", "blocks.3.attention~ model/attention.py:41"),
        (" in optim/adamw.py_114.606/aten__add.1/aten__add", "optim/adamw.py:114"),
        ("~ in model/gpt.py_126.1/blocks.0.norm~ in model/norms.py_9.2/aten__mul", "blocks.0.norm~ model/norms.py:9"),
        (" in model/gpt.py_6.1/blocks.0.norm~~ in model/xla/saved.py_60.2/x", "blocks.0.norm~ model/xla/saved.py:60"),
        ("aten__add.31/aten__add", ""),
        ("", ""),
    ],
)
def test_labels(op_name: str, expected: str) -> None:
    assert str(read_label(op_name)) == expected


def test_a_label_for_all_layers() -> None:
    label = read_label("blocks.11.attention.query in model/layers.py_26.13/aten__mm").of_layer()
    assert str(label) == "blocks.*.attention.query model/layers.py:26"


def test_costs_that_kernels_declare(scheduled: dict[str, Instruction]) -> None:
    assert scheduled["kernel.1"].is_kernel
    assert scheduled["kernel.1"].kernel_cost == (1.97e9, 819e3)
    assert scheduled["fusion.1"].kernel_cost is None


def test_aliases() -> None:
    header = "HloModule x, input_output_alias={ {0}: (208, {}, may-alias), {1}: (7, {}, may-alias) }\n"
    assert aliased_parameters(header) == {208, 7}
    assert aliased_parameters("HloModule x\n") == set()
