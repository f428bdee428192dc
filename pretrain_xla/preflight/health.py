"""Probable mistakes in a compiled step: each finding is one line that says what, where, and what it costs."""

from __future__ import annotations

import dataclasses
from collections import Counter

from pretrain_xla.config import RunConfig
from pretrain_xla.preflight.compile_result import CompileResult
from pretrain_xla.preflight.hlo import Instruction, Module
from pretrain_xla.preflight.memory import Memory
from pretrain_xla.preflight.traffic import product_flops, products

HOST = frozenset(("send", "recv", "infeed", "outfeed"))
LARGE = 2**20
"""Bytes from which a replicated tensor is reported."""
EDGE = 0.97
"""Fraction of the capacity above which a verdict is not reliable."""
LANES = 128
"""Width of the TPU's vectors and matrix unit."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: `warning` (should be fixed) or `note` (good to know)."""

    level: str
    text: str


def config_findings(config: RunConfig, generation: str) -> list[Finding]:
    """Findings on shapes and types, before compilation."""
    model = config.model
    findings = []
    if model.heads_dim % LANES:
        lost = 1 - model.heads_dim / (-(-model.heads_dim // LANES) * LANES)
        findings.append(
            Finding(
                "note",
                f"heads of width {model.heads_dim} leave {lost:.0%} of the {LANES}-wide matrix unit idle in attention: "
                f"--head-dim {LANES} with fewer heads computes as much in less time",
            )
        )
    if model.padded_vocab_size % LANES:
        findings.append(
            Finding(
                "warning",
                f"the vocabulary's {model.padded_vocab_size} rows are not a multiple of {LANES}: use --vocab-multiple",
            )
        )
    elif model.padded_vocab_size != model.vocab_size:
        extra = model.padded_vocab_size / model.vocab_size - 1
        findings.append(
            Finding(
                "note", f"vocabulary {model.vocab_size:,} padded to {model.padded_vocab_size:,} rows ({extra:.2%} more)"
            )
        )
    for key, size in (("d_model", model.d_model), ("d_ff", model.d_ff)):
        if size % LANES:
            findings.append(
                Finding("warning", f"{key}={size} is not a multiple of {LANES}: the rest of each vector is idle")
            )
    if config.train.mixed_precision != "bf16":
        findings.append(Finding("warning", "computing in fp32: --mixed-precision bf16 is several times as fast"))
    if generation in ("v2", "v3") and model.attention != "reference":
        findings.append(Finding("note", f"{generation} runs plain attention: its kernels do not take bf16"))
    return findings


def input_findings(result: CompileResult, memory: Memory) -> list[Finding]:
    """Findings on free memory, donation and sharding."""
    findings = [Finding("warning", result.detours)] if result.detours else []
    if memory.fits and memory.total > EDGE * memory.capacity:
        findings.append(
            Finding("warning", "at the edge of HBM: the runtime may refuse what the compiler just accepted")
        )
    if memory.not_donated:
        names = ", ".join(memory.not_donated[:3]) + (" …" if len(memory.not_donated) > 3 else "")
        findings.append(
            Finding(
                "warning",
                f"{len(memory.not_donated)} tensors of the state are held twice, not updated in place: {names}",
            )
        )
    if result.mesh.get("fsdp", 1) * result.mesh.get("tensor", 1) > 1:
        whole = [
            i
            for i in result.inputs
            if not i.sharded and i.kind in ("parameter", "optimizer") and i.device_bytes >= LARGE
        ]
        if whole:
            size = sum(item.device_bytes for item in whole)
            findings.append(
                Finding(
                    "warning",
                    f"{len(whole)} tensors of the state are whole on every device ({size / 1e6:.0f} MB), as {whole[0].name}",
                )
            )
    if memory.padding > 0.05 * (memory.parameters + memory.optimizer + 1):
        findings.append(Finding("note", f"layouts pad the step's inputs by {memory.padding / 1e6:.0f} MB"))
    return findings


def module_findings(config: RunConfig, module: Module) -> list[Finding]:
    """Findings on host transfers, types and loops in the compiled program."""
    findings = []
    scheduled = list(module.scheduled())
    hosts = [i for i in scheduled if i.opcode in HOST or "host" in i.target.lower()]
    if hosts:
        where = _lines(hosts)
        findings.append(Finding("warning", f"{len(hosts)} transfers between host and device inside the step: {where}"))
    wide = [i for i in scheduled if any(a.dtype == "f64" and len(a.shape) > 0 for a in i.results)]
    if wide:
        findings.append(
            Finding("warning", f"{len(wide)} operations on f64 arrays, which a TPU emulates: {_lines(wide)}")
        )
    if config.train.mixed_precision == "bf16":
        findings += _fp32_products(module, scheduled)
    unknown = module.unknown_loops()
    if unknown:
        findings.append(
            Finding("warning", f"{len(unknown)} loops of unknown length are counted once: {_lines(unknown)}")
        )
    costless = [i for i in scheduled if i.is_kernel and i.kernel_cost is None]
    if costless:
        findings.append(
            Finding(
                "note",
                f"{len(costless)} kernels state no cost: only the bytes they move are counted: {_lines(costless)}",
            )
        )
    return findings


def _fp32_products(module: Module, scheduled: list[Instruction]) -> list[Finding]:
    total = single = 0.0
    lines: Counter[str] = Counter()
    for instruction in scheduled:
        for product in products(module, instruction):
            flops = instruction.times * product_flops(module, product)
            total += flops
            operands = [array for operand in module.operands(product) for array in operand.results]
            if operands and all(array.dtype == "f32" for array in operands):
                single += flops
                lines[str(product.label.of_layer()) or product.opcode] += int(flops)
    if not total or single / total < 1e-3:
        return []
    where = ", ".join(line for line, _ in lines.most_common(3))
    return [
        Finding(
            "warning",
            f"{single / total:.1%} of the matrix arithmetic is in fp32, at a fraction of the bf16 rate: {where}",
        )
    ]


def _lines(instructions: list[Instruction]) -> str:
    counts = Counter(str(i.label.of_layer()) or i.op_name or i.opcode for i in instructions)
    return ", ".join(line for line, _ in counts.most_common(3))
