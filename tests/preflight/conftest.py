"""A small HLO module as the TPU compiler prints it, and compile results that contain it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.preflight.compile_result import Compiled, CompileResult, Input, Shortage

MODULE = """\
HloModule train_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%fused_product (a: bf16[1024,256], b: bf16[256,512]) -> bf16[1024,512] {
  %a = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf, \
metadata={op_name="blocks.3.attention.query~ in model/layers.py_26.7/aten__mm"}
}

%fused_slice (whole: f32[4096,128], at: s32[]) -> f32[8,128] {
  %whole = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[8,128]{1,0:T(8,128)} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={8,128}
}

%fused_around (whole.2: f32[4096,128], at.3: s32[]) -> f32[8,128] {
  %whole.2 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %at.3 = s32[]{:T(128)} parameter(1)
  ROOT %inner = f32[8,128]{1,0:T(8,128)} fusion(%whole.2, %at.3), kind=kLoop, calls=%fused_slice
}

%fused_update (whole.1: f32[4096,128], part: f32[8,128], at.1: s32[]) -> f32[4096,128] {
  %whole.1 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %part = f32[8,128]{1,0:T(8,128)} parameter(1)
  %at.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-update-slice.1 = f32[4096,128]{1,0:T(8,128)} dynamic-update-slice(%whole.1, %part, %at.1, %zero.1)
}

%body (carried: (s32[], bf16[1024,256], bf16[256,512])) -> (s32[], bf16[1024,256], bf16[256,512]) {
  %carried = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %left = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=1
  %right = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carried), index=2
  %count = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %fusion.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} fusion(%left, %right), kind=kOutput, calls=%fused_product, \
metadata={op_name="blocks.3.attention.query~ in model/layers.py_26.7/aten__mm"}, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%count, %left, %right)
}

%condition (carried.1: (s32[], bf16[1024,256], bf16[256,512])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %constant.1 = pred[]{:T(128)} constant(true)
}

ENTRY %main (tokens: bf16[1024,256], weight: bf16[256,512], table: f32[4096,128], at.2: s32[]) -> bf16[1024,512] {
  %tokens = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %weight = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(1)
  %table = f32[4096,128]{1,0:T(8,128)} parameter(2)
  %at.2 = s32[]{:T(128)} parameter(3)
  %copy-start = (bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%weight)
  %copy-done = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[4096,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%table), slice={[0:16], [0:128]}
  %slice-done = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %tuple.2 = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%at.2, %tokens, %copy-done)
  %while = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.2), \
condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %slice.1 = f32[8,128]{1,0:T(8,128)} fusion(%table, %at.2), kind=kLoop, calls=%fused_slice, \
metadata={op_name=" in optim/adamw.py_107.9/aten__mul"}, backend_config={"window_config":{"estimated_cycles":"500"}}
  %update.1 = f32[4096,128]{1,0:T(8,128)} fusion(%table, %slice.1, %at.2), kind=kLoop, calls=%fused_update, \
backend_config={"window_config":{"estimated_cycles":"300"}}
  %slice.2 = f32[8,128]{1,0:T(8,128)} fusion(%table, %at.2), kind=kLoop, calls=%fused_around
  %kernel.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} custom-call(%tokens), custom_call_target="tpu_custom_call", \
metadata={op_name="blocks.0.attention in model/attention.py_190.3/kernel"}, backend_config={"custom_call_config":\
{"body":"TUzv","cost_estimate":{"flops":"1970000000","transcendentals":"5","bytes_accessed":"819000"}}}
  %all-reduce-start = f32[1048576]{0:T(1024)} all-reduce-start(%table), replica_groups=[1,8]<=[8], to_apply=%add
  %between = bf16[1024,512]{1,0:T(8,128)(2,1)} fusion(%tokens, %copy-done), kind=kOutput, calls=%fused_product, \
backend_config={"window_config":{"estimated_cycles":"15000"}}
  %all-reduce-done = f32[1048576]{0:T(1024)} all-reduce-done(%all-reduce-start)
  %all-gather.1 = bf16[1024,2048]{1,0:T(8,128)(2,1)} all-gather(%between), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  ROOT %result = bf16[1024,512]{1,0:T(8,128)(2,1)} fusion(%tokens, %copy-done), kind=kOutput, calls=%fused_product
}
"""

OUT_OF_MEMORY = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.52G of 15.75G hbm. \
Exceeded hbm capacity by 1.77G.

Total hbm usage >= 17.77G:
    reserved        258.00M
    program          17.52G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="blocks.0.attention in model/attention.py_39.185/aten__softmax" source_file="x.py" source_line=48
     Shape: f32[2048,1024,1024]{1,2,0:T(8,128)}
     Unpadded size: 6.00G
     XLA label: fusion.11 = fusion(fusion.15), kind=kOutput, calls=fused_computation.11
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[1024,1024,128]{1,0:T(8,128)}
     Unpadded size: 512.00M
     XLA label: copy-start.24 = copy-start(get-tuple-element.19)
     Allocation type: HLO temp
     ==========================
"""

ONE_BUFFER = (
    "RESOURCE_EXHAUSTED: Allocation (size=68719476736) would exceed memory (size=17179869184) :: #allocation510 "
    "[shape = 'bf16[1048576,32768]{0,1:T(8,128)(2,1)}', space=hbm, size = 0xffffffffffffffff, tag = 'output of fusion.10'] "
    ":: <no-hlo-instruction>"
)


@pytest.fixture
def config() -> RunConfig:
    """A small model in bf16."""
    return make_config()


def make_config(**sections: Any) -> RunConfig:
    """The small model with some settings changed."""
    tree: dict[str, Any] = {
        "model": {"d_model": 128, "num_layers": 2, "num_heads": 1, "d_ff": 256, "vocab_size": 512, "seq_length": 128},
        "train": {"train_batch_size": 64, "mixed_precision": "bf16", "train_steps": 1000},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return build_config(tree, "test")


@pytest.fixture
def make_result() -> Callable[..., CompileResult]:
    """Builds compile results that contain `MODULE`, or a shortage of memory."""

    def make(shortage: Shortage | None = None, mesh: dict[str, int] | None = None, **changes: Any) -> CompileResult:
        mib = 2**20
        compiled = Compiled(MODULE, 1e9, 1e9, 100 * mib, 90 * mib, 90 * mib, 400 * mib, 10 * mib, 12.0)
        inputs = (
            Input("embedding.weight", "parameter", "float32", (512, 128), 30 * mib, False, True),
            Input("first_moment.embedding.weight", "optimizer", "float32", (512, 128), 60 * mib, False, True),
            Input("tokens", "batch", "int32", (8, 1, 129), 4 * mib, True, False),
        )
        values: dict[str, Any] = {
            "compiled": None if shortage else compiled,
            "shortage": shortage,
            "inputs": inputs,
            "mesh": mesh or {"data": 8, "fsdp": 1, "tensor": 1},
            "trace_seconds": 1.0,
            "compile_seconds": 12.0,
            "libtpu": "0.0.21",
        }
        return CompileResult(**(values | changes))

    return make
