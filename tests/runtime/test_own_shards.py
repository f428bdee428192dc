"""What each device holds of a sharded tensor, from XLA's notation for its sharding."""

from __future__ import annotations

import pytest

from pretrain_xla.runtime.shards import Region
from pretrain_xla.runtime.xla.own_shards import tile_regions


@pytest.mark.parametrize(
    ("spec", "shape", "numbers", "expected"),
    [
        # A mesh of 2 x 2: rows over its second axis, replicated over the first. Listed devices, and counted ones.
        (
            "{devices=[2,1,2]0,2,1,3 last_tile_dim_replicate}",
            (6, 4),
            [0, 1, 2, 3],
            [((0, 0), (3, 4)), ((3, 0), (3, 4)), ((0, 0), (3, 4)), ((3, 0), (3, 4))],
        ),
        (
            "{devices=[2,1,2]<=[2,2]T(1,0) last_tile_dim_replicate}",
            (6, 4),
            [3, 2],
            [((3, 0), (3, 4)), ((0, 0), (3, 4))],
        ),
        # Both dimensions; the second host of two.
        ("{devices=[2,2]<=[4]}", (6, 4), [2, 3], [((3, 0), (3, 2)), ((3, 2), (3, 2))]),
        # Five rows over four devices are padded to two each: the third has one, the last none.
        (
            "{devices=[4,1]0,1,2,3}",
            (5, 3),
            [0, 1, 2, 3],
            [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((4, 0), (1, 3)), ((5, 0), (0, 3))],
        ),
    ],
)
def test_tiles_of_devices(spec: str, shape: tuple[int, ...], numbers: list[int], expected: list[Region]) -> None:
    assert tile_regions(spec, shape, numbers) == expected
