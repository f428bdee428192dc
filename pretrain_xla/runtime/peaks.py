"""Peak bf16 matrix rate of one device, as its maker states it, for model-flops utilisation.

TPUs: Google Cloud TPU documentation, "System architecture"; v2 and v3 chips hold two cores and each is a device of its own,
so the figure is half the chip's. GPUs: NVIDIA data sheets, dense (without sparsity).
"""

from __future__ import annotations

import re

TERA = 1e12

TPU_PEAKS = {
    "v2": 23 * TERA,
    "v3": 61.5 * TERA,
    "v4": 275 * TERA,
    "v5e": 197 * TERA,
    "v5p": 459 * TERA,
    "v6e": 918 * TERA,
}

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


def tpu_peak(accelerator_type: str) -> float | None:
    """Peak of one device of a TPU named as Google Cloud does (`v3-8`, `v5litepod-16`, `v5p-128`, `v6e-8`)."""
    family = accelerator_type.lower().split("-")[0]
    return TPU_PEAKS.get({"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p"}.get(family, family))


def gpu_peak(name: str) -> float | None:
    """Peak of a GPU by the name its driver gives."""
    # Whole words: an L40 is not an L4, nor a T400 a T4.
    return next((peak for key, peak in GPU_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
