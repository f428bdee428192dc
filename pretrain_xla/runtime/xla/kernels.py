"""Pallas kernels in the graph that torch_xla traces, and flash attention made of them.

A kernel is a JAX function. JAX lowers it for TPUs once for each set of shapes, which needs no TPU, and the traced graph calls
the lowered computation. Interpreted, the same function lowers to plain operations, so the tests run this file on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.kernels.flash_backward import backward
from pretrain_xla.kernels.flash_forward import forward
from pretrain_xla.kernels.flash_kernels import mosaic_version
from pretrain_xla.kernels.flash_limits import Heads, supports
from pretrain_xla.kernels.flash_prepare import Preparation
from pretrain_xla.model.attention import attention_scale
from pretrain_xla.model.xla.attention import KernelInputs
from pretrain_xla.model.xla.saved import Save
from pretrain_xla.runtime.sharding import BATCH, Axis
from pretrain_xla.runtime.xla.local_shards import global_tensor, local_shard

JAX_TYPES = {torch.bfloat16: jnp.bfloat16, torch.float32: jnp.float32, torch.int32: jnp.int32}

_computations: dict[Hashable, Any] = {}


def call_jax(function: Callable[..., Any], key: Hashable, tensors: Sequence[Tensor], platform: str) -> list[Tensor]:
    """Call a JAX function on XLA tensors, as a part of the traced graph.

    Args:
        function: takes arrays, returns a flat tuple of arrays.
        key: identifies the function: equal keys with equal shapes are the same computation.
        tensors: its arguments.
        platform: `tpu`, or `cpu` for an interpreted kernel.
    """
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    full_key = (key, shapes, platform)
    if full_key not in _computations:
        jax.config.update("jax_use_shardy_partitioner", False)
        arguments = [jax.ShapeDtypeStruct(shape, JAX_TYPES[dtype]) for shape, dtype in shapes]
        with mosaic_version():
            traced = jax.jit(function, keep_unused=True).trace(*arguments)
            lowered: Any = traced.lower(lowering_platforms=(platform,)).compiler_ir("hlo")
        proto = lowered.as_serialized_hlo_module_proto()
        _computations[full_key] = xb.computation_from_module_proto("kernel", proto)
    results: list[Tensor] = torch_xla._XLAC._xla_user_computation("xla::kernel", list(tensors), _computations[full_key])
    return results


@dataclasses.dataclass(frozen=True)
class FlashAttention:
    """`model.xla.attention.AttentionKernel` on TPUs.

    chip: generation, such as `v5e`. mesh: devices over which queries, keys and values are sharded, by rows and heads. None
    means that the tensors are one device's. interpret: run without a TPU.
    """

    chip: str
    mesh: xs.Mesh | None = None
    interpret: bool = False

    def __call__(self, inputs: KernelInputs, config: ModelConfig, save: Save) -> Tensor | None:
        """See `model.xla.attention.AttentionKernel`."""
        tensor = 1 if self.mesh is None else self.mesh.shape()["tensor"]
        heads = Heads(
            config.num_heads // tensor, config.kv_heads // tensor, config.heads_dim, attention_scale(config),
            config.attention_softcap, norm_eps=config.norm_eps,
        )  # fmt: skip
        if supports(heads, inputs.query_BTF.shape[1], self.chip) is not None:
            return None
        projections = (inputs.query_BTF, inputs.key_BTS, inputs.value_BTS)
        norms, tables = (inputs.query_norm_E, inputs.key_norm_E), inputs.rotary or (None, None)
        result: Tensor = _Flash.apply(self, heads, save, *projections, *norms, *tables, inputs.segments_BT)
        return result

    def run(self, function: Any, heads: Heads, named: dict[str, Tensor | None], results: list[str]) -> list[Tensor]:
        """Call a kernel with the tensors that are not None, on each device's local shards."""
        present = {name: tensor for name, tensor in named.items() if tensor is not None}
        names = tuple(present)

        def call(*arrays: Any) -> Any:
            return function(dict(zip(names, arrays, strict=True)), heads, self.interpret)

        key = (function, heads, names, self.interpret)
        platform = "cpu" if self.interpret else "tpu"
        if self.mesh is None:
            return call_jax(call, key, list(present.values()), platform)
        shards = [local_shard(tensor, AXES[name], self.mesh) for name, tensor in present.items()]
        return [
            global_tensor(shard, AXES[name], self.mesh)
            for name, shard in zip(results, call_jax(call, key, shards, platform), strict=True)
        ]


COLUMNS: tuple[Axis, ...] = (BATCH, None, "tensor")
AXES: dict[str, tuple[Axis, ...]] = {
    **dict.fromkeys(("query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue"), COLUMNS),
    "logsumexp": (BATCH, "tensor", None, None),
    **dict.fromkeys(("cos", "sin"), (None, None)),
    "segments": (BATCH, None),
    **dict.fromkeys(("query_norm", "key_norm"), (None,)),
    # One row for each device, to be summed outside: a device has the sum over its own shard only.
    **dict.fromkeys(("dquery_norm", "dkey_norm"), ((*BATCH, "tensor"), None)),
}
"""Mesh axes of each dimension of a kernel's inputs and outputs."""


def _preparation(arrays: dict[str, Any]) -> Preparation:
    return Preparation(arrays.get("cos"), arrays.get("sin"), arrays.get("query_norm"), arrays.get("key_norm"))


def _forward(arrays: dict[str, Any], heads: Heads, interpret: bool) -> Any:
    inputs = (arrays["query"], arrays["key"], arrays["value"], arrays.get("segments"))
    return forward(*inputs, heads, _preparation(arrays), interpret=interpret)


def _backward(arrays: dict[str, Any], heads: Heads, interpret: bool) -> Any:
    inputs = (arrays["query"], arrays["key"], arrays["value"], arrays.get("segments"))
    outputs = (arrays["out"], arrays["logsumexp"], arrays["dout"])
    dquery, dkey, dvalue, *dnorms = backward(*inputs, *outputs, heads, _preparation(arrays), interpret=interpret)
    return dquery, dkey, dvalue, *(dnorm[None] for dnorm in dnorms if dnorm is not None)


INPUTS = ("query", "key", "value", "query_norm", "key_norm", "cos", "sin", "segments")


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: FlashAttention, heads: Heads, save: Save, *tensors: Tensor | None) -> Tensor:
        named = dict(zip(INPUTS, tensors, strict=True))
        out_BTF, logsumexp = save.outputs(lambda: attention.run(_forward, heads, named, ["out", "logsumexp"]), 2)
        ctx.save_for_backward(*tensors, out_BTF, logsumexp)
        ctx.attention, ctx.heads = attention, heads
        return out_BTF

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, out_BTF, logsumexp = ctx.saved_tensors
        named = dict(zip(INPUTS, tensors, strict=True))
        norms = [name for name in ("query_norm", "key_norm") if named[name] is not None]
        results = ["dquery", "dkey", "dvalue", *(f"d{name}" for name in norms)]
        named |= {"out": out_BTF, "logsumexp": logsumexp, "dout": grads[0]}
        found = dict(zip(results, ctx.attention.run(_backward, ctx.heads, named, results), strict=True))
        weights = [found[f"d{name}"].sum(0) if f"d{name}" in found else None for name in ("query_norm", "key_norm")]
        return None, None, None, found["dquery"], found["dkey"], found["dvalue"], *weights, None, None, None
