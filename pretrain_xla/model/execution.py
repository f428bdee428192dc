"""How a model is run, as opposed to what it computes: memory against time, one loop against copies of its body."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Execution:
    """The same numbers, up to rounding, by other means.

    Attributes:
        rematerialization: what backward computes again: `none`; `selective`: all but matrix products and attention; `full`:
            each block from its input.
        scan_layers: run the blocks as one loop, where a machine has loops that compile. They are then always rematerialised:
            `none` means `full`.
        loss_chunk: tokens of a device whose logits exist at one time. None means all.
    """

    rematerialization: Literal["none", "selective", "full"] = "none"
    scan_layers: bool = False
    loss_chunk: int | None = None
