"""How long a step takes: two estimates from the compiler's figures, and their components.

optimistic: everything overlaps, and the slowest resource decides: the largest of operations / peak, HBM bytes / bandwidth and
interconnect time. conservative: one operation after another, as scheduled: the compiler's `estimated_cycles` / clock,
times the counts of loops, plus kernels, plus exposed communication; at least the time of its bytes. A run that is
limited by its input or its host is slower than both. A kernel (Pallas) has no cycles: it takes the larger of its own
operations / (peak x the share of peak that a large matrix product gets by the compiler's cycles) and its own bytes /
bandwidth.
"""

from __future__ import annotations

import dataclasses

from pretrain_xla.config import RunConfig
from pretrain_xla.model.flops import flops_per_token
from pretrain_xla.preflight.collectives import Collective
from pretrain_xla.preflight.hlo import Instruction, Module
from pretrain_xla.preflight.topology import Topology
from pretrain_xla.preflight.traffic import hbm_bytes, product_flops, products
from pretrain_xla.runtime.chips import Chip


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of one line in a step. seconds: by cycles, or of a kernel. bytes: HBM traffic."""

    where: str
    what: str
    count: int
    seconds: float
    bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """A step time and the rates that follow. mfu: by the convention of `model/flops.py`, relative to the stated bf16 peak."""

    seconds: float
    tokens_per_second: float
    tokens_per_second_per_chip: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one device. Seconds, operations, bytes."""

    flops: float
    model_flops: float
    hbm_bytes: int
    cycles: int
    cycle_seconds: float
    kernel_seconds: float
    kernels: int
    kernels_without_cost: int
    communication_seconds: float
    exposed_seconds: float
    flops_seconds: float
    bytes_seconds: float
    optimistic: Speed
    conservative: Speed
    operations: tuple[Operation, ...]


def estimate_step(
    config: RunConfig, module: Module, collectives: tuple[Collective, ...], topology: Topology
) -> Estimate:
    """Both estimates for a compiled step."""
    chip = topology.chip
    flops, moved, cycles, kernel_seconds, kernels, costless = 0.0, 0, 0, 0.0, 0, 0
    groups: dict[str, list[tuple[Instruction, float, int, float]]] = {}
    for instruction in module.scheduled():
        times = instruction.times
        traffic = hbm_bytes(module, instruction)
        operations = sum(product_flops(module, product) for product in products(module, instruction))
        seconds = instruction.cycles / chip.clock
        if instruction.is_kernel:
            cost = instruction.kernel_cost
            operations = cost[0] if cost else 0.0
            seconds = kernel_time(operations, traffic, chip)
            kernel_seconds += times * seconds
            kernels += times
            costless += times * (cost is None)
        flops += times * operations
        moved += times * traffic
        cycles += times * instruction.cycles
        if seconds:
            groups.setdefault(_where(module, instruction), []).append((instruction, seconds, traffic, operations))
    total_communication = sum(row.seconds for row in collectives)
    exposed = sum(row.exposed for row in collectives)
    flops_seconds, bytes_seconds = flops / chip.peak_flops, moved / chip.hbm_bandwidth
    cycle_seconds = cycles / chip.clock
    optimistic = max(flops_seconds, bytes_seconds, total_communication)
    conservative = max(cycle_seconds + kernel_seconds + exposed, bytes_seconds)
    return Estimate(
        flops=flops,
        model_flops=flops_per_token(config.model) * config.tokens_per_step / topology.devices,
        hbm_bytes=moved,
        cycles=cycles,
        cycle_seconds=cycle_seconds,
        kernel_seconds=kernel_seconds,
        kernels=kernels,
        kernels_without_cost=costless,
        communication_seconds=total_communication,
        exposed_seconds=exposed,
        flops_seconds=flops_seconds,
        bytes_seconds=bytes_seconds,
        optimistic=speed(optimistic, config, topology),
        conservative=speed(conservative, config, topology),
        operations=_most_expensive(module, groups),
    )


def kernel_time(flops: float, traffic: float, chip: Chip) -> float:
    """Seconds of one run of a kernel that does this many operations and moves this many HBM bytes."""
    return max(flops / (chip.peak_flops * chip.matmul_fraction), traffic / chip.hbm_bandwidth)


def speed(seconds: float, config: RunConfig, topology: Topology) -> Speed:
    """Rates of a run whose steps take this long."""
    rate = config.tokens_per_step / seconds if seconds else 0.0
    peak = topology.chip.peak_flops * topology.devices
    chips = topology.devices / topology.chip.devices_per_chip
    return Speed(seconds, rate, rate / chips, rate * flops_per_token(config.model) / peak)


def _where(module: Module, instruction: Instruction) -> str:
    """Module and line of an operation; for a fusion, of its matrix product or else of its last operation."""
    for candidate in (*products(module, instruction), instruction):
        if candidate.label.line:
            return str(candidate.label.of_layer())
    name = instruction.op_name.rpartition("/")[2]
    # Operations without a line come from autograd (sums of gradients) or the compiler.
    return f"({name.partition('.')[0]}, by autograd)" if name else f"({instruction.opcode}, by the compiler)"


def _most_expensive(
    module: Module, groups: dict[str, list[tuple[Instruction, float, int, float]]]
) -> tuple[Operation, ...]:
    rows = []
    for where, parts in groups.items():
        heaviest = max(parts, key=lambda part: part[1])[0]
        result = max(heaviest.results, key=lambda array: array.bytes, default=None)
        kind = "matrix product" if products(module, heaviest) else heaviest.opcode
        what = "kernel" if heaviest.is_kernel else kind
        rows.append(
            Operation(
                where,
                f"{what} {result}" if result else what,
                sum(part[0].times for part in parts),
                sum(part[0].times * part[1] for part in parts),
                sum(part[0].times * part[2] for part in parts),
                sum(part[0].times * part[3] for part in parts),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.seconds))
