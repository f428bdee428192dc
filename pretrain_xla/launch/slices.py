"""What a topology means on Google Cloud: accelerator type, hosts, image, zones, quotas and prices.

The tables are those of Google's documentation and price list as of 2025. Zones and prices change: a zone is asked whether it
has the type before anything is created there, and `--price-per-chip-hour` overrides a price.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_xla.errors import UserError

TIERS = ("on-demand", "spot", "reserved", "flex-start")

RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""The image of each generation."""

ZONES: dict[str, tuple[str, ...]] = {
    "v2": ("us-central1-a", "us-central1-b", "us-central1-c", "us-central1-f", "europe-west4-a", "asia-east1-c"),
    "v3": ("us-central1-a", "us-central1-b", "us-central1-f", "europe-west4-a"),
    "v4": ("us-central2-b",),
    "v5e": (
        "us-west4-a", "us-west4-b", "us-west1-c", "us-central1-a", "us-south1-a", "us-east1-c", "us-east5-a",
        "us-east5-b", "us-east5-c", "europe-west4-a", "europe-west4-b", "asia-southeast1-b",
    ),
    "v5p": ("us-east5-a", "us-east5-b", "us-east5-c", "us-central1-a", "us-south1-a", "europe-west4-b"),
    "v6e": (
        "us-east5-a", "us-east5-b", "us-east5-c", "us-east1-d", "us-central1-b", "us-east4-a", "us-east4-b",
        "us-west1-c", "us-south1-a", "us-south1-b", "europe-west4-a", "asia-northeast1-b", "southamerica-west1-a",
    ),
}  # fmt: skip
"""Zones that are published for each generation; others are asked all the same."""

ON_DEMAND = {"v2": 1.125, "v3": 2.0, "v4": 3.22, "v5e": 1.2, "v5p": 4.2, "v6e": 2.7}
"""Dollars for an hour of a chip, in the cheapest region."""
DEARER = {"europe": 1.3, "asia": 1.3, "southamerica": 1.5}
"""A factor on it elsewhere, rounded up."""
SINGLE_HOST = {"v5e": 8, "v6e": 8}
"""The largest slice with one host, where that is more than four chips; larger ones have four chips a host."""
CHIPS_PER_HOST = 4
SMALLEST = {"v5e": 1, "v6e": 1}
"""Chips of the smallest slice; others have four."""
EGRESS_PER_GB = 0.02
"""Dollars for a GB between two regions of a continent; more between continents."""

_QUOTAS = {
    "v2": ("TPUV2{}PerProjectPerZoneForTPUAPI",),
    "v3": ("TPUV3{}PerProjectPerZoneForTPUAPI",),
    "v4": ("TPUV4s{}PodPerProjectPerZoneForTPUAPI",),
    "v5e": ("TPUV5s{}LitepodPerProjectPerZoneForTPUAPI", "TPUV5s{}LitepodServingPerProjectPerZoneForTPUAPI"),
    "v5p": ("TPUV5P{}PerProjectPerZoneForTPUAPI",),
    "v6e": ("TPUV6E{}PerProjectPerZoneForTPUAPI",),
}


@dataclass(frozen=True)
class Slice:
    """A slice of Google Cloud.

    topology: as it was asked for. generation: v2 to v6e. accelerator_type: Google's name. chips, hosts: their number. count:
    the number in its type, in which quotas are counted.
    """

    topology: str
    generation: str
    accelerator_type: str
    chips: int
    hosts: int
    count: int

    @property
    def runtime_version(self) -> str:
        """The image of its workers."""
        return RUNTIME_VERSIONS[self.generation]

    def quota_id(self, tier: str) -> str:
        """The quota that it counts against; a v5e of one host has another than larger ones."""
        names = _QUOTAS[self.generation]
        name = names[-1] if self.hosts == 1 else names[0]
        return name.format("Preemptible" if tier in ("spot", "flex-start") else "")

    def price(self, zone: str) -> float:
        """Dollars for an hour of the whole slice on demand, which is more than spot and flex-start cost."""
        return ON_DEMAND[self.generation] * DEARER.get(zone.split("-")[0], 1.0) * self.chips


def resolve_slice(topology: str) -> Slice:
    """The slice that a topology means.

    Raises:
        UserError: there is none on Google Cloud.
    """
    from pretrain_xla.preflight.topology import COUNTS_CORES, resolve_topology  # it imports torch

    found = resolve_topology(topology)
    generation, chips = found.chip.name, found.chips
    if chips < SMALLEST.get(generation, CHIPS_PER_HOST):
        raise UserError(f"--topology {topology}: Google Cloud has {generation} from {CHIPS_PER_HOST} chips on")
    count = chips * 2 if generation in COUNTS_CORES else chips
    name = "v5litepod" if generation == "v5e" else generation
    hosts = 1 if chips <= SINGLE_HOST.get(generation, CHIPS_PER_HOST) else chips // CHIPS_PER_HOST
    return Slice(topology, generation, f"{name}-{count}", chips, hosts, count)


def check_zones(zones: tuple[str, ...], wanted: Slice) -> list[str]:
    """A note for each zone that Google does not list for this generation.

    Raises:
        UserError: no zone, or something that cannot be one.
    """
    listed = ZONES[wanted.generation]
    if not zones:
        raise UserError(f"name the zones to ask with --zone, one or more of {', '.join(listed)}")
    for zone in zones:
        if len(zone.split("-")) != 3 or not zone.replace("-", "").isalnum():
            raise UserError(f"--zone {zone}: not a zone; {wanted.generation} is in {', '.join(listed)}")
    return [
        f"{zone} is not among the zones that are published for {wanted.generation} ({', '.join(listed)})"
        for zone in zones
        if zone not in listed
    ]
