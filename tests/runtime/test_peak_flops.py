"""Peak FLOPs by the names that clouds and drivers give; a device that is not in the table has none."""

from __future__ import annotations

import pytest

from pretrain_xla.runtime.peak_flops import gpu_peak, tpu_peak

TERA = 1e12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("v2-8", 23),
        ("v3-8", 61.5),
        ("v4-32", 275),
        ("v5litepod-16", 197),
        ("v5e-8", 197),
        ("v5p-128", 459),
        ("v6e-8", 918),
        ("V6E-1", 918),
    ],
)
def test_tpus(name: str, peak: float) -> None:
    assert tpu_peak(name) == peak * TERA


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_gpus(name: str, peak: float) -> None:
    assert gpu_peak(name) == peak * TERA


@pytest.mark.parametrize("name", ["", "v1-8", "v9x-8", "cpu"])
def test_a_tpu_not_in_the_table_has_no_peak(name: str) -> None:
    assert tpu_peak(name) is None


# Names that contain a name of the table: an L40 is not an L4, and a wrong peak gives a wrong utilisation.
@pytest.mark.parametrize(
    ("name", "not_this"),
    [
        ("CPU", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40", 121),
        ("NVIDIA RTX A1000", 312),
        ("NVIDIA T400 4GB", 65),
    ],
)
def test_a_gpu_not_in_the_table_does_not_get_anothers_peak(name: str, not_this: float | None) -> None:
    peak = gpu_peak(name)
    assert peak is None if not_this is None else peak != not_this * TERA
