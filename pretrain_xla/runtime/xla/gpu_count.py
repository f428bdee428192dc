"""How many GPUs this host has, asked before torch_xla is imported."""

from __future__ import annotations

import glob
import os


def gpu_count() -> int:
    """GPUs to use on this host: GPU_NUM_DEVICES, or those that CUDA_VISIBLE_DEVICES or the system shows."""
    if "GPU_NUM_DEVICES" in os.environ:
        return int(os.environ["GPU_NUM_DEVICES"])
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([word for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if word.strip()])
    # The second: Windows' subsystem for Linux.
    return len(glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/dxg"))
