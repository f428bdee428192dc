"""How large the measured programs are: long beside the time that the host needs to start one, and seconds in all."""

from __future__ import annotations

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """For one kind of device; per device, not in all.

    side: of the square matrices, a power of 4. products: one after another in one program. stream_bytes: of the array that a
    pass reads and writes. passes: one after another in one program. collective_bytes: of the larger side of a collective.
    repeats: runs of a program between two looks at the clock. tokens: of the sequence that the kernels attend over.
    """

    side: int
    products: int
    stream_bytes: int
    passes: int
    collective_bytes: int
    repeats: int
    tokens: int


LARGE = Sizes(4096, 16, 1024 * MIB, 4, 64 * MIB, 10, 1024)
"""For TPUs and GPUs: on a v5e about 11 ms of products and 10 ms of passes in a program."""

SMALL = Sizes(256, 16, 8 * MIB, 4, 4 * MIB, 2, 128)
"""For CPUs."""


def sizes_for(kind: str) -> Sizes:
    """The sizes for a kind of device: `CPU`, `TPU` or `CUDA`."""
    return SMALL if kind.upper() == "CPU" else LARGE


ROUNDS = 3
"""The fastest of so many counts: a slower one was disturbed."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
