"""Figures of the TPU generations: one table for the trainer's utilisation and for preflight.

A device is what PyTorch/XLA sees: a core on v2 and v3 (two per chip), a whole chip on the others (v4 and v5p join their two
cores, "megacore"). Bytes and operations are per device; the interconnect is per chip.

Sources. Peak, HBM size and bandwidth: Google Cloud's documentation, "System architecture" and the page of each generation; v2
and v3: Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks". Interconnect, one link in one
direction: v2 and v3 the same paper; v4 and later "How to scale your model" (jax-ml/scaling-book, "TPU
networking"), which is 0.8 to 0.9 of what Google Cloud's tables state for all links together. VMEM: the papers and Jouppi et
al. 2023 ("TPU v4"); v5e and later: JAX's Pallas documentation. usable_hbm: the limit that libtpu 0.0.21 reports when a
program does not fit; the rest is reserved. clock: converts libtpu's `estimated_cycles` to time; v2, v3 and v4 by the papers,
the others as the clock at which the matrix units reach the stated peak. matmul_fraction and stream_fraction compare the
compiler's estimates with the stated peaks; libtpu 0.0.21 compiled an 8,192³ bf16 matrix product and 2 x + 1 over 1 GiB of fp32.
"""

from __future__ import annotations

import dataclasses
import re

TERA = 1e12
GIGA = 1e9
GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    peak_flops: bf16 matrix operations/s. hbm_bytes: HBM as sold; usable_hbm: what the compiler can allocate. hbm_bandwidth:
    bytes/s. vmem_bytes: on-chip memory of one core. clock: Hz. matmul_fraction, stream_fraction: rates of a large matrix
    product and of a plain pass over memory, by the compiler's cycles, as fractions of peak_flops and hbm_bandwidth.
    devices_per_chip: see the module. link_bandwidth: bytes/s that a chip sends over one link to a neighbour. links: number of
    links. wrap: a dimension of at least this many chips is closed to a ring; on v2 and v3 only in whole pods.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    usable_hbm: int
    hbm_bandwidth: float
    vmem_bytes: int
    clock: float
    matmul_fraction: float
    stream_fraction: float
    devices_per_chip: int
    link_bandwidth: float
    links: int
    wrap: int

    @property
    def device_noun(self) -> str:
        """Name of a device: `core` or `chip`."""
        return "core" if self.devices_per_chip > 1 else "chip"


def _chip(
    name: str,
    *,
    teraflops: float,
    hbm_gib: float,
    usable_gib: float,
    bandwidth: float,
    vmem_mib: int,
    gigahertz: float,
    matmul: float,
    stream: float,
    devices: int,
    link: float,
    links: int,
    wrap: int,
) -> Chip:
    return Chip(
        name,
        teraflops * TERA,
        int(hbm_gib * GIB),
        int(usable_gib * GIB),
        bandwidth * GIGA,
        vmem_mib * MIB,
        gigahertz * GIGA,
        matmul,
        stream,
        devices,
        link * GIGA,
        links,
        wrap,
    )


# fmt: off
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _chip("v2", teraflops=23, hbm_gib=8, usable_gib=7.48, bandwidth=350, vmem_mib=16, gigahertz=0.70,
              matmul=0.98, stream=0.90, devices=2, link=62, links=4, wrap=16),
        _chip("v3", teraflops=61.5, hbm_gib=16, usable_gib=15.48, bandwidth=450, vmem_mib=16, gigahertz=0.94,
              matmul=0.97, stream=0.94, devices=2, link=82, links=4, wrap=32),
        _chip("v4", teraflops=275, hbm_gib=32, usable_gib=30.75, bandwidth=1200, vmem_mib=16, gigahertz=1.05,
              matmul=0.93, stream=0.79, devices=1, link=45, links=6, wrap=4),
        _chip("v5e", teraflops=197, hbm_gib=16, usable_gib=15.75, bandwidth=819, vmem_mib=128, gigahertz=1.50,
              matmul=0.88, stream=0.81, devices=1, link=45, links=4, wrap=16),
        _chip("v5p", teraflops=459, hbm_gib=96, usable_gib=95.74, bandwidth=2765, vmem_mib=64, gigahertz=1.75,
              matmul=0.90, stream=0.72, devices=1, link=90, links=6, wrap=4),
        _chip("v6e", teraflops=918, hbm_gib=32, usable_gib=31.25, bandwidth=1640, vmem_mib=128, gigahertz=1.75,
              matmul=0.70, stream=0.81, devices=1, link=90, links=4, wrap=16),
    )
}
# fmt: on


_NAME = re.compile(
    r"(?:tpu[-_ ]*v?|v)(?P<number>[0-9]+)[-_ ]?(?P<kind>lite|[a-z])?(?:[-_ ]?(?:pod|slice|podslice|device))?(?:[-:].*)?"
)


def generation(name: str) -> str:
    """Our name of a generation for any of its names; unknown names are returned in lower case.

    Known are Google Cloud's accelerator types (`v5litepod-8`, `v5e-8`, `V6E`), GKE's (`tpu-v5-lite-podslice`), the names that
    devices report (`TPU v5 lite`, `TPU v5e`, `TPU v5`, `TPU7x`), and libtpu's topologies (`v5e:2x4`).
    """
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        return name.strip().lower()
    kind = match["kind"] or ""
    if match["number"] in ("5", "6"):
        kind = {"lite": "e", "": "p" if match["number"] == "5" else ""}.get(kind, kind)
    return f"v{match['number']}{kind}"
