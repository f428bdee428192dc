"""Which rows of a global batch a process reads if each device (or replica) holds whole rows.

A batch is split evenly over the devices in the order of their numbers, as in the mesh. A host feeds only its own devices, whose
numbers need not be consecutive: in a v5e slice of 4 x 4 chips the first host has 0, 1, 4 and 5. So its rows are those of its
devices, wherever in the batch they are. With a tensor axis, devices share rows, and each process reads all of them:
`XlaRuntime.rows` decides.

The alternative is a mesh in the order of hosts. XLA's partitioner handles device lists badly that are not in ascending order:
on three axes it moves weights from chip to chip before it gathers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def device_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of devices in the whole run, from PyTorch/XLA's names for them, such as `TPU:5`."""
    return [int(name.rpartition(":")[2]) for name in names]


def rows_of(devices: Sequence[int], count: int, batch_size: int) -> np.ndarray:
    """Rows of a batch on some devices, one device after the other, int64.

    Args:
        devices: their numbers, in the order in which they are fed.
        count: devices of the whole run; divides `batch_size`.
        batch_size: rows of the whole batch.
    """
    share = batch_size // count
    return (np.asarray(devices, np.int64)[:, None] * share + np.arange(share)).reshape(-1)
