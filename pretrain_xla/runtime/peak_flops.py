"""Peak bf16 matrix rate of one device, as its maker states it, for model-flops utilisation.

TPUs: the table in `chips.py`. GPUs: NVIDIA data sheets, dense (without sparsity).
"""

from __future__ import annotations

import re

from pretrain_xla.runtime.chips import CHIPS, TERA, generation

GPU_PEAKS = {
    "H200": 989 * TERA,
    "H100": 989 * TERA,
    "A100": 312 * TERA,
    "L40S": 362 * TERA,
    "L4": 121 * TERA,
    "A10": 125 * TERA,
    "T4": 65 * TERA,
    "V100": 125 * TERA,
    "RTX 4090": 165 * TERA,
    "RTX 3090": 71 * TERA,
}


def tpu_peak(name: str) -> float | None:
    """Peak of one device of a TPU, by any name that `generation` knows."""
    chip = CHIPS.get(generation(name))
    return chip.peak_flops if chip else None


def gpu_peak(name: str) -> float | None:
    """Peak of a GPU by the name its driver gives."""
    # Whole words: an L40 is not an L4, nor a T400 a T4.
    return next((peak for key, peak in GPU_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
