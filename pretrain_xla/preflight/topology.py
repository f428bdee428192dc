"""Names of TPU slices, as users type them and as libtpu needs them.

`v5litepod-16`, `v3-8`, `v5p-128` (Google Cloud's accelerator types) and `v5e:4x4`, `v3:2x2`, `v4:2x2x1` (libtpu's: generation
and chips along each dimension) mean a slice. A type's number counts cores on v2, v3, v4 and v5p and chips on v5e and v6e.
"""

from __future__ import annotations

import dataclasses
import math
import re

from pretrain_xla.errors import UserError
from pretrain_xla.runtime.chips import CHIPS, Chip, generation
from pretrain_xla.runtime.tpu_chip import accelerator_type, pci_chips

SHAPES_2D = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16), 512: (16, 32),
}  # fmt: skip
SHAPES_3D = {
    1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8),
}  # fmt: skip
COUNTS_CORES = ("v2", "v3", "v4", "v5p")
EXAMPLES = "v3-8, v4-32, v5litepod-16 (or v5e-16), v5p-128, v6e-8; or v5e:2x4, v3:2x2, v4:2x2x1"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice. name: as it was asked for. shape: chips along each dimension. devices: those that PyTorch/XLA would see."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: int

    @property
    def libtpu_name(self) -> str:
        """The name that libtpu knows, e.g. `v5e:2x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def libtpu_options(self) -> dict[str, object]:
        """Further options for libtpu: v4's cores as one device, and hosts smaller than the usual 2x2 chips."""
        options: dict[str, object] = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        return options

    @property
    def chips(self) -> int:
        """Chips of the slice, which are paid for."""
        return math.prod(self.shape)

    def links(self, chips: int) -> int:
        """Links to others of its group that a chip has at the worst place, a corner, for groups of that many chips.

        A group lies along the fewest dimensions that hold it, as neighbouring devices do. Each gives one link, or two where the
        group fills a dimension that is closed to a ring. v4 and v5p close theirs only in slices of whole 4x4x4 cubes.
        """
        may_close = self.chip.links == 4 or min(self.shape) >= 4
        count, held = 0, 1
        for size in sorted(self.shape, reverse=True):
            if held < chips and size > 1:
                count += 2 if may_close and size >= self.chip.wrap and chips >= held * size else 1
                held *= size
        return count

    def bandwidth(self, chips: int) -> float:
        """Bytes/s that such a chip can send to its group."""
        return self.chip.link_bandwidth * self.links(chips)


def resolve_topology(name: str) -> Topology:
    """The slice that a name means.

    Raises:
        UserError: there is no such generation, or not in that size.
    """
    word = name.strip()
    match = re.fullmatch(r"(?:tpu[-_ ]?)?(v[0-9][a-z]*)(?:-([0-9]+)|:([0-9]+(?:x[0-9]+)+))", word.lower())
    if match is None or generation(match.group(1)) not in CHIPS:
        raise UserError(f"topology={word!r}: unknown TPU; expected one of {', '.join(CHIPS)}, written as {EXAMPLES}")
    chip = CHIPS[generation(match.group(1))]
    shapes = SHAPES_3D if chip.links == 6 else SHAPES_2D
    if match.group(3):
        shape = tuple(int(size) for size in match.group(3).split("x"))
        if chip.links == 4 and len(shape) == 3 and shape[2] == 1:
            shape = shape[:2]
        if len(shape) != (3 if chip.links == 6 else 2) or tuple(sorted(shape)) not in {
            tuple(sorted(known)) for known in shapes.values()
        }:
            known = ", ".join(f"{chip.name}:{'x'.join(map(str, known))}" for known in shapes.values())
            raise UserError(f"topology={word!r}: no such slice; expected one of {known}")
        return Topology(word, chip, shape, math.prod(shape) * chip.devices_per_chip)
    count = int(match.group(2))
    cores = 2 if chip.name in COUNTS_CORES else 1
    if count == 1 and chip.devices_per_chip == 2:
        return Topology(word, chip, shapes[1], 1)
    if count % cores or count // cores not in shapes:
        known = ", ".join(f"{chip.name}-{chips * cores}" for chips in shapes)
        counted = "cores" if cores == 2 else "chips"
        raise UserError(f"topology={word!r}: no such size; expected one of {known} (the number counts {counted})")
    shape = shapes[count // cores]
    return Topology(word, chip, shape, math.prod(shape) * chip.devices_per_chip)


def chosen_topology(name: str | None) -> Topology:
    """The slice that was asked for, or the one that this host is part of.

    Raises:
        UserError: none was named, and this host has no TPU.
    """
    name = name or accelerator_type()
    if not name:
        raise UserError(f"name the TPU to compile for with --topology: {EXAMPLES}{_what_is_here()}")
    return resolve_topology(name)


def _what_is_here() -> str:
    """The chips of this host, where the size of their slice is not known."""
    chips = pci_chips()
    if not chips:
        return ""
    return f" (this host has {len(chips)} {chips[0] or 'v2 or v3'} chips, but does not report the slice that they are part of)"
