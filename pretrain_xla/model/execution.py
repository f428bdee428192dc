"""How a model is run, as opposed to what it computes: memory against time, loops against copies."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pretrain_xla.model.loops import Fence, Loop, no_fence
from pretrain_xla.model.split import WHOLE, Split


@dataclasses.dataclass(frozen=True)
class Execution:
    """The same numbers, up to rounding, by other means.

    Attributes:
        rematerialization: what backward computes again: `none`; `selective`: all but matrix products and attention; `full`:
            each block from its input.
        scan_layers: run the blocks as one loop; needs `loop`. They are then always rematerialised: `none` means `full`, since
            what a turn keeps is copied, which costs more than to compute it again.
        loss_chunk: tokens of a device whose logits exist at one time; none: all.
        loop: a loop that compiles into one; none: there is no such thing here.
        fence: keeps a compiler from merging a second computation with the first.
        split: how a batch lies on devices.
    """

    rematerialization: Literal["none", "selective", "full"] = "none"
    scan_layers: bool = False
    loss_chunk: int | None = None
    loop: Loop | None = None
    fence: Fence = no_fence
    split: Split = WHOLE
