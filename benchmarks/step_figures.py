"""Helper module of `tpu_step.py`, not a command: reads the figures of compiled steps and compares them.

A Pallas kernel is a black box to the compiler: it has no cycles, and its flops and bytes are those that its author declared, if
any. Ours declare them, JAX's do not. So declared costs are subtracted here, and replaced by one rule for both sides.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.kernels.flash_kernels import LANES, Heads, cost
from pretrain_xla.model.flops import flops_per_token
from pretrain_xla.preflight.compile_result import Compiled
from pretrain_xla.preflight.estimate import kernel_time
from pretrain_xla.preflight.hlo import Instruction, Module
from pretrain_xla.preflight.traffic import hbm_bytes, product_flops, products
from pretrain_xla.runtime.chips import Chip

RULES = """\
Rules, the same for both sides:
  cycles       the compiler's estimated_cycles, summed over the schedule, / clock. Kernels have none.
  kernels      runs of the attention kernel in the module, times kernels/flash_kernels.cost: 2 products forward and 5 backward,
               over the causal score blocks of our default size, all lanes; / (peak flops x the share of them that a large
               product reaches by the compiler's cycles). A kernel's other work (softmax; norms or rotary, where fused) is
               left out: it should overlap with the matrix unit.
  accessed     the compiler's count, including on-chip memory. For a kernel it counts only what its author declared, which is
               subtracted: a kernel is 0 here. The same for flops.
  HBM          preflight's count: operands and results that are not in on-chip memory. A kernel is 0, or each of its operands
               and results once (an array passed twice counts once).
  products     the matrix products of the module, by their shapes.
  model/flops  forward and backward, all T x T pairs, the unpadded vocabulary."""

WITHIN = 0.05
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one side, for one step: milliseconds, bytes, flops; `forward` and `backward` are runs of attention kernels."""

    cycle_ms: float
    kernel_ms: float
    forward: int
    backward: int
    accessed: float
    hbm: int
    hbm_with_kernels: int
    temporaries: int
    arguments: int
    flops: float
    products: float
    kernel_flops: float

    @property
    def total_ms(self) -> float:
        """Operations one after another, kernels by the rule."""
        return self.cycle_ms + self.kernel_ms

    @property
    def memory(self) -> int:
        """HBM that the step needs; its results reuse the memory of its arguments."""
        return self.arguments + self.temporaries


def read_figures(config: RunConfig, compiled: Compiled, module: Module, chip: Chip) -> Figures:
    """Read one side's figures; the step was compiled for `config.train.train_batch_size` sequences.

    Raises:
        UserError: the step has a loop, whose operations the compiler and preflight count differently.
    """
    if any(instruction.opcode == "while" for instruction in module.scheduled()):
        raise UserError("the compiled step has loops: their bytes and flops cannot be compared")
    cycles, hbm, with_kernels, declared_flops, declared_bytes, matrix = 0, 0, 0, 0.0, 0.0, 0.0
    runs = {False: 0, True: 0}
    for instruction in module.scheduled():
        if instruction.is_kernel:
            runs[is_backward(instruction)] += 1
            with_kernels += kernel_traffic(module, instruction)
            flops, moved = instruction.kernel_cost or (0.0, 0.0)
            declared_flops += flops
            declared_bytes += moved
        else:
            cycles += instruction.cycles
            hbm += hbm_bytes(module, instruction)
            matrix += sum(product_flops(module, product) for product in products(module, instruction))
    kernel_flops, kernel_seconds = 0.0, 0.0
    for backward, count in runs.items():
        one = attention_flops(config, backward=backward)
        kernel_flops += count * one
        kernel_seconds += count * kernel_time(one, 0.0, chip)
    return Figures(
        cycle_ms=cycles / chip.clock * 1e3,
        kernel_ms=kernel_seconds * 1e3,
        forward=runs[False],
        backward=runs[True],
        accessed=compiled.bytes_accessed - declared_bytes,
        hbm=hbm,
        hbm_with_kernels=hbm + with_kernels,
        temporaries=compiled.temp_bytes,
        arguments=compiled.argument_bytes,
        flops=compiled.flops - declared_flops,
        products=matrix,
        kernel_flops=kernel_flops,
    )


def attention_flops(config: RunConfig, *, backward: bool) -> float:
    """Flops of one layer's attention over the batch, by the rule."""
    model = config.model
    heads = Heads(model.num_heads, model.kv_heads, model.heads_dim, scale=1.0, softcap=model.attention_softcap)
    return float(cost(heads, config.train.train_batch_size, model.seq_length, 2, backward=backward).flops)


def is_backward(instruction: Instruction) -> bool:
    """Whether an operation belongs to the backward pass, of our step or of JAX's."""
    return instruction.label.backward or "transpose(" in instruction.op_name


def kernel_traffic(module: Module, kernel: Instruction) -> int:
    """HBM bytes of a kernel's operands and results, each array once."""
    sources = {}
    for operand in module.operands(kernel):
        while operand.opcode == "bitcast":
            operand = module.operands(operand)[0]
        sources[operand.name] = operand
    arrays = [array for part in (kernel, *sources.values()) for array in part.results]
    return sum(array.hbm_bytes for array in arrays)


def print_table(config: RunConfig, sides: dict[str, Figures]) -> None:
    """Print a row for each figure, with a column for each side and ours / each other side."""
    others = [title for title in sides if title != "ours"]
    print(f"{'':44}" + "".join(f"{name:>15}" for name in [*sides, *(f"ours/{title}" for title in others)]))

    def row(name: str, values: list[float], digits: int, note: str = "") -> None:
        ratios = [values[0] / value if value else float("nan") for value in values[1:]]
        cells = [f"{value:15,.{digits}f}" for value in values] + [f"{ratio:15.3f}" for ratio in ratios]
        print(f"{name:44}" + "".join(cells) + note)

    every = list(sides.values())
    row("ms by cycles, kernels apart", [side.cycle_ms for side in every], 2)
    if any(side.kernel_ms for side in every):
        runs = "  (" + ", ".join(f"{title} {side.forward}+{side.backward}" for title, side in sides.items()) + " runs)"
        row("ms of kernels, by the rule", [side.kernel_ms for side in every], 2, runs)
        row("ms in total", [side.total_ms for side in every], 2)
    row("GB accessed (compiler), kernels apart", [side.accessed / GIGA for side in every], 2)
    row("GB through HBM (preflight), kernels apart", [side.hbm / GIGA for side in every], 2)
    row("GB through HBM, with kernels' arrays", [side.hbm_with_kernels / GIGA for side in every], 2)
    row("GB of temporaries", [side.temporaries / GIGA for side in every], 3)
    row("GB of arguments", [side.arguments / GIGA for side in every], 3)
    row("GB of arguments + temporaries", [side.memory / GIGA for side in every], 3)
    row("Tflop (compiler), kernels apart", [side.flops / 1e12 for side in every], 3)
    row("Tflop of products (preflight), kernels apart", [side.products / 1e12 for side in every], 3)
    tokens = config.tokens_per_step
    model = f"  (model/flops.py {flops_per_token(config.model) / 1e6:,.0f})"
    per_token = [(side.products + side.kernel_flops) / tokens / 1e6 for side in every]
    row("Mflop a token, products + kernels", per_token, 0, model)


def padded_bytes(config: RunConfig) -> int:
    """HBM that JAX's kernel wastes on narrow heads: queries, keys, values and output of each layer, saved for backward.

    The last dimension of its arrays is the head width, which the TPU's memory layout pads to 128 lanes.
    """
    model = config.model
    rows = config.train.train_batch_size * model.seq_length * model.num_heads
    return model.num_layers * 4 * rows * (-model.heads_dim % LANES) * 2


def print_checks(config: RunConfig, sides: dict[str, Figures]) -> None:
    """Print whether ours is ahead, and whether both need the same for the same work."""
    ours = sides["ours"]
    for title, other in sides.items():
        if other is ours:
            continue
        ahead = {
            "ms by cycles": (ours.cycle_ms, other.cycle_ms),
            "ms in total": (ours.total_ms, other.total_ms),
            "GB accessed": (ours.accessed, other.accessed),
            "GB through HBM": (ours.hbm_with_kernels, other.hbm_with_kernels),
        }
        verdicts = [f"{name} {'yes' if mine < theirs else 'NO'}" for name, (mine, theirs) in ahead.items()]
        print(f"ahead of {title}: {', '.join(verdicts)}")
        same = {
            "arguments + temporaries": (ours.memory, other.memory),
            "flops (compiler)": (ours.flops, other.flops),
            "flops of products": (ours.products, other.products),
        }
        padding = padded_bytes(config)
        if padding and other.forward:
            name = f"arguments + temporaries without {padding / GIGA:.3f} GB of its heads' padding"
            same[name] = (ours.memory, other.memory - padding)
        verdicts = [
            f"{name} {mine / theirs - 1:+.1%} {'yes' if abs(mine / theirs - 1) <= WITHIN else 'NO'}"
            for name, (mine, theirs) in same.items()
        ]
        print(f"within {WITHIN:.0%} of {title}: {', '.join(verdicts)}")


def expensive_lines(module: Module, chip: Chip, count: int) -> list[str]:
    """The source lines whose operations move the most bytes, including on-chip memory, summed over layers."""
    # The same module with everything in HBM, which is what the compiler calls accessed.
    all_in_hbm = Module(module.text.replace("S(1)", ""))
    rows: dict[str, list[float]] = {}
    for instruction in module.scheduled():
        if instruction.is_kernel:
            values = [0.0, float(kernel_traffic(module, instruction)), 0.0]
        elif instruction.opcode == "custom-call":
            continue  # an annotation, which moves nothing
        else:
            twin = all_in_hbm.computations[instruction.computation][instruction.name]
            values = [float(hbm_bytes(all_in_hbm, twin)), float(hbm_bytes(module, instruction)), instruction.cycles]
        row = rows.setdefault(_where(module, instruction), [0.0, 0.0, 0.0, 0.0])
        for index, value in enumerate((*values, 1.0)):
            row[index] += value
    best = sorted(rows.items(), key=lambda item: -item[1][0])[:count]
    best.append(("all lines", [sum(column) for column in zip(*rows.values(), strict=True)]))
    return [f"{'GB accessed':>13}{'GB HBM':>9}{'ms':>8}{'runs':>7}  where"] + [
        f"{accessed / GIGA:13.2f}{hbm / GIGA:9.2f}{cycles / chip.clock * 1e3:8.2f}{runs:7.0f}  {where}"
        for where, (accessed, hbm, cycles, runs) in best
    ]


def _where(module: Module, instruction: Instruction) -> str:
    label = instruction.label.of_layer()
    operation = instruction.op_name.rpartition("/")[2]
    if instruction.opcode.endswith("-start"):
        # The compiler's own transfers between HBM and on-chip memory: name the array.
        moved = module.operands(instruction)[0].results
        return f"({instruction.opcode} of {' '.join(map(str, moved))})"
    if label.line:
        return str(label)
    if instruction.source:
        return f"{Path(instruction.source).name}{'~' if is_backward(instruction) else ''} {operation}"
    return f"({operation or instruction.opcode})"
