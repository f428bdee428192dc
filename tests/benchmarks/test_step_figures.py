"""The comparison of steps: neither the costs that a kernel declares nor the memory of its arrays favours a side."""

import pytest

from benchmarks.step_figures import Figures, read_figures
from benchmarks.tpu_step import one_chip
from pretrain_xla.errors import UserError
from pretrain_xla.preflight.compile_result import Compiled
from pretrain_xla.preflight.hlo import Module
from pretrain_xla.runtime.chips import CHIPS

DECLARED = (1e9, 2e6)
ESTIMATE = ',"cost_estimate":{"flops":"1000000000","transcendentals":"7","bytes_accessed":"2000000"}'
MODULE = """HloModule step, is_scheduled=true

%product (a: bf16[256,512], b: bf16[512,128]) -> bf16[256,128] {
  %a = bf16[256,512]{1,0} parameter(0)
  %b = bf16[512,128]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[256,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[256,512], w: bf16[512,128]) -> bf16[256,128] {
  %x = bf16[256,512]{1,0} parameter(0)
  %w = bf16[512,128]{1,0} parameter(1)
  %fusion.1 = bf16[256,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1500"}
  %forward = bf16[256,128]{1,0:S(1)} custom-call(%fusion.1, %fusion.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"AA=="ESTIMATE}}
  ROOT %backward = bf16[256,128]{1,0} custom-call(%forward), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp())/pallas_call"}, backend_config={"custom_call_config":{"body":"AA=="ESTIMATE}}
}
"""  # noqa: E501
PRODUCT_FLOPS, PRODUCT_BYTES = 2.0 * 256 * 512 * 128, 2 * (256 * 512 + 512 * 128 + 256 * 128)


def figures(text: str, declared: tuple[float, float]) -> Figures:
    """Figures of a module where the compiler counts for each of the two kernels what it declares."""
    flops, moved = PRODUCT_FLOPS + 2 * declared[0], PRODUCT_BYTES + 2 * declared[1]
    compiled = Compiled(text, flops, moved, 10, 10, 10, 20, 0, 0.0)
    return read_figures(one_chip("gpt2_124m", None), compiled, Module(text), CHIPS["v5e"])


def test_declared_costs_make_no_difference() -> None:
    without = figures(MODULE.replace("ESTIMATE", ""), (0.0, 0.0))
    with_costs = figures(MODULE.replace("ESTIMATE", ESTIMATE), DECLARED)
    assert without == with_costs
    assert without.flops == without.products == PRODUCT_FLOPS
    assert without.accessed == without.hbm == PRODUCT_BYTES
    assert (without.forward, without.backward) == (1, 1)
    assert without.cycle_ms == pytest.approx(1e-3)
    # 12 heads' causal blocks of 256, 128 lanes: 2 products forward, 5 backward.
    assert without.kernel_flops == 7 * 2 * 128 * 8 * 12 * 10 * 256**2
    # The forward kernel's operand once, although passed twice; on-chip memory not at all.
    assert without.hbm_with_kernels - without.hbm == 2 * 256 * 128 * 2


def test_a_loop_is_refused() -> None:
    loop = MODULE.replace("ESTIMATE", "").replace("custom-call(%forward)", "while(%forward)")
    with pytest.raises(UserError, match="loops"):
        figures(loop, (0.0, 0.0))
