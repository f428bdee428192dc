"""The attention that this machine trains with, against attention written out in fp32 on the host: results and gradients.

On a TPU that is the kernel on every device, on a CPU the same kernel in Pallas' interpreter. Where the trainer has no kernel
(v2, v3, a GPU, jax not installed), its plain attention is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.doctor.check import Figures
from pretrain_xla.kernels.flash_limits import WITHOUT_KERNELS
from pretrain_xla.model.attention import Heads, attend, reference_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]
"""(query_BTF, key_BTS, value_BTS, gradient of the result_BTF) → the result and the three gradients, all on the host."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference from the reference, as a share of the reference's largest value: sums of rounded products."""

NAMES = ("result", "gradient of queries", "gradient of keys", "gradient of values")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared. what: for display. rows: sequences, one for each device."""

    what: str
    attend: Attend
    dtype: torch.dtype
    rows: int


def model_of(tokens: int) -> ModelConfig:
    """Two query heads that share a key and value head, as wide as a vector register."""
    return ModelConfig(
        d_model=256, num_heads=2, num_kv_heads=1, head_dim=128, num_layers=1, seq_length=tokens, vocab_size=128
    )


def compare(subject: Subject, model: ModelConfig) -> Figures:
    """The largest difference of each tensor from the reference's, as a share of the reference's largest value."""
    inputs = make_inputs(model, subject.dtype)
    wanted = reference(inputs, model)
    repeated = [tensor.expand(subject.rows, -1, -1).contiguous() for tensor in inputs]
    query, key, value, dout = repeated
    found = subject.attend(query, key, value, dout)
    errors = {}
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        difference = (one.float() - other).abs().amax((1, 2)) / other.abs().max()
        errors[name] = [round(float(share), 7) for share in difference]
    return {"what": subject.what, "tolerance": TOLERANCE[subject.dtype], "errors": errors}


def make_inputs(model: ModelConfig, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, [1, T, width]; the same on every host."""
    generator = torch.Generator().manual_seed(0)
    widths = [heads * model.heads_dim for heads in (model.num_heads, model.kv_heads, model.kv_heads, model.num_heads)]
    return [torch.randn(1, model.seq_length, width, generator=generator).to(dtype) for width in widths]


def reference(inputs: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Attention written out, in fp32, from the same rounded inputs: the result and the three gradients."""
    query, key, value, dout = (tensor.float() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = joined(reference_attention(split(query, key, value, model), None, model), model)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def split(query_BTF: Tensor, key_BTS: Tensor, value_BTS: Tensor, model: ModelConfig) -> Heads:
    """The projections by head."""
    width = (-1, model.heads_dim)
    query, key, value = (tensor.unflatten(-1, width).transpose(1, 2) for tensor in (query_BTF, key_BTS, value_BTS))
    return Heads(query, key, value)


def joined(heads_BHTE: Tensor, model: ModelConfig) -> Tensor:
    """Heads side by side."""
    return heads_BHTE.transpose(1, 2).flatten(2)


def torch_subject(model: ModelConfig, device: torch.device) -> Subject:
    """The fused attention of PyTorch, as the torch runtime calls it."""

    def run(*tensors: Tensor) -> list[Tensor]:
        placed = [tensor.to(device) for tensor in tensors]
        leaves = [tensor.requires_grad_() for tensor in placed[:3]]
        out = joined(attend(split(leaves[0], leaves[1], leaves[2], model), None, model), model)
        return [tensor.detach().cpu() for tensor in (out, *torch.autograd.grad(out, leaves, placed[3]))]

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Subject(f"fused attention of PyTorch ({device.type})", run, dtype, 1)


def xla_subject(model: ModelConfig, chip: str | None, bench: Any) -> Subject:
    """The kernel of this TPU, or the interpreted one on a CPU; plain attention where there is no kernel.

    Args:
        model: heads and length.
        chip: generation of TPUs. None means no TPU.
        bench: the devices, an `XlaBench`.
    """
    from pretrain_xla.model.xla.attention import KernelInputs
    from pretrain_xla.model.xla.saved import SAVE_NOTHING
    from pretrain_xla.runtime.xla.local_shards import backward_in_this_thread

    on_cpu = bench.kind == "CPU"
    kernel, what = None, "plain attention"
    if on_cpu or (chip is not None and chip not in WITHOUT_KERNELS):
        try:
            from pretrain_xla.runtime.xla.kernels import FlashAttention

            kernel = FlashAttention(chip or "v5e", bench.mesh, interpret=on_cpu)
            what = "the kernel, interpreted" if on_cpu else f"the kernel for {chip}"
        except ModuleNotFoundError as error:
            what = f"plain attention ({error.name} is not installed)"

    def run(*tensors: Tensor) -> list[Tensor]:
        placed: list[Tensor] = bench.place(tensors)
        query, key, value = leaves = [tensor.requires_grad_() for tensor in placed[:3]]
        inputs = KernelInputs(query, key, value, None, None, None, None)
        out = kernel(inputs, model, SAVE_NOTHING) if kernel is not None else None
        if out is None:
            out = joined(reference_attention(split(query, key, value, model), None, model), model)
        with backward_in_this_thread():
            found = [out.detach(), *torch.autograd.grad(out, leaves, placed[3])]
        copies: list[Tensor] = bench.fetch(found)
        return copies

    return Subject(what, run, torch.float32 if on_cpu else torch.bfloat16, bench.count)
