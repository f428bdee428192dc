"""The HBM traffic of an operation, and the matrix products that it contains.

HBM bytes are those of operands and results that are not in on-chip memory. A slice, or a fusion that only slices an operand,
counts the slice and not the operand. An in-place update counts the update. An asynchronous copy counts once, at its start.
Padding of buffers is not counted.
"""

from __future__ import annotations

import functools
import math
import re

from pretrain_xla.preflight.hlo import Instruction, Module

FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while call conditional after-all partition-id replica-id "
    "opt-barrier copy-done async-start async-update async-done slice-done send-done recv-done all-reduce-done "
    "all-gather-done collective-permute-done domain".split()
)
"""Bookkeeping, and the ends of operations that count at their start. Loops and calls count by their contents."""
SLICES = frozenset(("slice", "dynamic-slice", "gather"))
THROUGH = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))
PRODUCTS = ("convolution", "dot")


def hbm_bytes(module: Module, instruction: Instruction) -> int:
    """Bytes that one run of an operation reads from and writes to HBM."""
    if instruction.opcode in FREE:
        return 0
    kernel = instruction.kernel_cost if instruction.is_kernel else None
    if kernel is not None:
        return int(kernel[1])
    operands = module.operands(instruction)
    if instruction.opcode.endswith("slice-start") and len(instruction.results) > 1:
        # ((source), slice, …): one copy of the slice, counted at each end that is in HBM.
        source, piece = instruction.results[:2]
        return piece.bytes * ((not source.on_chip) + (not piece.on_chip))
    # The results of other asynchronous starts are the target and the source.
    results = instruction.results[:1] if instruction.opcode.endswith("-start") else instruction.results
    written = sum(array.hbm_bytes for array in results)
    if instruction.opcode in SLICES:
        in_hbm = bool(operands and operands[0].results and not operands[0].results[0].on_chip)
        return written + (sum(array.bytes for array in results) if in_hbm else 0)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].results[0].bytes if written else 0
    if instruction.opcode == "fusion" and instruction.called:
        return _fusion_bytes(module, instruction, operands)
    return written + sum(array.hbm_bytes for operand in operands for array in operand.results)


def _fusion_bytes(module: Module, fusion: Instruction, operands: list[Instruction]) -> int:
    inner = module.computations.get(fusion.called[0], {})
    total = 0
    for number, operand in enumerate(operands):
        whole = sum(array.hbm_bytes for array in operand.results)
        taken = _bytes_taken(module, fusion.called[0], number) if whole else 0
        total += whole if taken is None else min(whole, taken)
    root = next((i for i in inner.values() if i.is_root), None)
    roots = module.operands(root) if root is not None and root.opcode == "tuple" else [root]
    if root is None or len(roots) != len(fusion.results):
        return total + sum(array.hbm_bytes for array in fusion.results)
    for array, result in zip(fusion.results, roots, strict=True):
        update = _behind(module, result)
        if array.hbm_bytes and update is not None and update.opcode == "dynamic-update-slice":
            total += min(array.bytes, sum(a.bytes for a in module.operands(update)[1].results))
        else:
            total += array.hbm_bytes
    return total


def _bytes_taken(module: Module, computation: str, number: int) -> int | None:
    """Bytes of a parameter that a computation reads, if it only slices the parameter, itself or in a fusion.

    An array that is updated in place is not read. None means that the whole parameter is read.
    """
    inner = module.computations.get(computation, {})
    parameter = next((i for i in inner.values() if i.opcode == "parameter" and _number(i) == number), None)
    if parameter is None:
        return None
    uses = [i for i in inner.values() if parameter.name in i.operand_names]
    if not uses:
        return None
    total = 0
    for use in uses:
        places = [place for place, name in enumerate(use.operand_names) if name == parameter.name]
        if use.opcode in SLICES and places == [0]:
            total += sum(array.bytes for array in use.results)
        elif use.opcode == "fusion" and use.called:
            taken = [_bytes_taken(module, use.called[0], place) for place in places]
            if None in taken:
                return None
            total += sum(one or 0 for one in taken)
        elif use.opcode != "dynamic-update-slice" or places != [0]:
            return None
    return total


def _number(parameter: Instruction) -> int:
    return int(parameter.text[parameter.text.index("(") + 1 : parameter.text.index(")")])


def _behind(module: Module, instruction: Instruction | None) -> Instruction | None:
    """The operation before changes of shape and type."""
    while instruction is not None and instruction.opcode in THROUGH:
        operands = module.operands(instruction)
        instruction = operands[0] if operands else None
    return instruction


def products(module: Module, instruction: Instruction) -> list[Instruction]:
    """The matrix products in one run of an operation."""
    if instruction.opcode in PRODUCTS:
        return [instruction]
    if instruction.opcode != "fusion":
        return []
    return [i for called in instruction.called for i in module.inside(called) if i.opcode in PRODUCTS]


def product_flops(module: Module, product: Instruction) -> float:
    """Operations of a matrix product (a multiply-add is 2), counted like XLA's cost analysis.

    The TPU compiler writes all of them as convolutions; a batch of products is one whose window is mostly outside.
    """
    operands = [array for operand in module.operands(product) for array in operand.results]
    if len(operands) < 2 or not product.results:
        return 0.0
    left, right, result = operands[0].shape, operands[1].shape, product.results[0].shape
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)
        sizes = [left[int(d)] for d in contracted.group(1).split(",") if d] if contracted else []
        return 2.0 * math.prod(result) * math.prod(sizes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
    if labels is None:
        return 0.0
    of_left, of_right, of_result = labels.groups()
    window = _window(product.text)
    positions = 1
    for dimension in (letter for letter in of_result if letter.isdigit()):
        index = int(dimension)
        positions *= _positions(
            left[of_left.index(dimension)],
            right[of_right.index(dimension)],
            result[of_result.index(dimension)],
            *(window[key][index] if index < len(window[key]) else default for key, default in _WINDOW_DEFAULTS),
        )
    groups = re.search(r"feature_group_count=(\d+)", product.text)
    batch_groups = re.search(r"batch_group_count=(\d+)", product.text)
    shared = int(groups.group(1)) if groups else 1
    batch = left[of_left.index("b")] // (int(batch_groups.group(1)) if batch_groups else 1)
    return 2.0 * batch * result[of_result.index("f")] * left[of_left.index("f")] / shared * positions


_WINDOW_DEFAULTS = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _window(text: str) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    values: dict[str, list[int]] = {key: [] for key, _ in _WINDOW_DEFAULTS}
    for key, value in re.findall(r"(\w+)=([\d_x\-]+)", found.group(1)) if found else ():
        # pad=low_high for each dimension: the low side places the window.
        values[key] = [int(part.split("_")[0]) for part in value.split("x")]
    return values


@functools.lru_cache(maxsize=4096)
def _positions(
    left: int, right: int, result: int, stride: int, pad: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs (output, window position) along one dimension that meet a real input element."""
    if right == 1 and stride == 1 and pad == 0 and left_dilation == 1:
        return min(left, result)
    reach = (left - 1) * left_dilation
    count = 0
    for position in range(right):
        offset = position * right_dilation - pad
        # Outputs o with 0 <= o * stride + offset <= reach that fall on an element and not on a gap between.
        low = max(0, -(offset // stride))
        high = min(result - 1, (reach - offset) // stride)
        # o * stride + offset is a multiple of the dilation for every `period`-th o, from `first` on, or for none.
        common = math.gcd(stride, left_dilation)
        if offset % common or high < low:
            continue
        period = left_dilation // common
        first = (-offset // common) * pow(stride // common, -1, period) % period if period > 1 else 0
        first += -((first - low) // period) * period if first < low else 0
        count += max(0, (high - first) // period + 1)
    return count
