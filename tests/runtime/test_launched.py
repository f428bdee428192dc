"""The variables that torchrun sets: all of them, and only some."""

from __future__ import annotations

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.runtime.launched import Launched, launched, speaks_first

FOUR = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a.host", "MASTER_PORT": "29500"}
TORCHRUN = FOUR | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def test_a_real_launch() -> None:
    assert launched(TORCHRUN) == Launched(1, 4, 1, 2, distributed=True)
    one = launched(FOUR)  # another launcher's, or left over: it waits, and says for which processes
    assert (one.rank, one.world_size, one.local_rank, one.local_world_size, one.distributed) == (1, 4, 0, 4, True)
    assert one.note is not None
    assert "waiting for the other processes at a.host:29500; unset RANK WORLD_SIZE MASTER_ADDR" in one.note
    assert launched({}) == Launched()
    assert launched({"MASTER_ADDR": "a.host", "MASTER_PORT": "29500"}) == Launched()


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "x"}])
def test_without_rank_the_rest_is_ignored(left: dict[str, str]) -> None:
    one = launched(left)
    assert one.note == f"{'='.join(*left.items())} in the environment without RANK: ignored, this process runs alone"
    assert one == Launched(note=one.note)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (
            {"RANK": "0"},
            "RANK=0 is in the environment, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: unset RANK to run",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT not: unset RANK WORLD_SIZE to run alone"),
        (FOUR | {"RANK": ""}, "RANK='' in the environment is not a number"),
        (FOUR | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a number"),
        (FOUR | {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in the environment is not a number"),
        (
            FOUR | {"RANK": "4"},
            "RANK=4 is not one of WORLD_SIZE=4 processes: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT",
        ),
    ],
)
def test_an_incomplete_set_with_rank_is_refused(left: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        launched(left)
    assert expected in str(caught.value)
    assert "start with torchrun" in str(caught.value)


def test_which_process_prints_before_the_start() -> None:
    assert speaks_first("xla", {"RANK": "1"}), "XLA does not read it"
    assert not speaks_first("xla", {"RANK": "1", "PJRT_DEVICE": "CUDA"}), "but here it is the process index"
    assert not speaks_first("torch", {"RANK": "1"})
    assert speaks_first("torch", {"RANK": "0"})
    assert speaks_first("torch", {})
