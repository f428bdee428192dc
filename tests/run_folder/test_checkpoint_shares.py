"""Several processes write one checkpoint, each its share; here each is a thread with a store of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.model.xla.stacked import unstack_layers
from pretrain_xla.run_folder import checkpoint_writing
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.checkpoint_index import Block, StoredTensor
from pretrain_xla.run_folder.checkpoint_reading import StoredTensors, values_checksum
from pretrain_xla.run_folder.state_source import read_regions, shape_of
from pretrain_xla.runtime import shards as shares
from pretrain_xla.runtime.shards import Region, Shard, Tiling, divide_rows, unstack_shards, whole_region


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"model.embedding.weight": (400, 64), "model.norm.weight": (64,), "optimizer.first_moment": (400, 64)}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return made | {"optimizer.step": torch.tensor(seed, dtype=torch.int32), "empty": torch.zeros(0, 3)}


def own(tensors: dict[str, Tensor], index: int, count: int) -> list[Shard]:
    return [rows.shard(tensors[rows.name], rows.of(tensors[rows.name])) for rows in divide_rows(tensors, index, count)]


def info(step: int, loss: float | None = None) -> CheckpointInfo:
    return CheckpointInfo(step, loss, "data", {})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "SMALLEST_PIECE", 1024)
    monkeypatch.setattr(checkpoint_writing, "POLL", 0.01)


def stores(root: Path, count: int) -> list[CheckpointStore]:
    made = [CheckpointStore(str(root), limit=1) for _ in range(count)]
    for index, store in enumerate(made):
        store.write_with_others(index, count)
    return made


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_writes_its_share_and_one_reads_it_all(count: int, tmp_path: Path) -> None:
    tensors = state()
    group = stores(tmp_path, count)
    for index, store in reversed(list(enumerate(group))):  # the main one last
        store.save(own(tensors, index, count), info(3))
    for store in group:
        store.close()
    folder = tmp_path / "step_00000003"
    names = {"checkpoint.json", "index.json", ".metadata", *(f"__{index}_0.distcp" for index in range(count))}
    assert {path.name for path in folder.iterdir()} == names
    sizes = [(folder / f"__{index}_0.distcp").stat().st_size for index in range(count)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert max(sizes) < 1.2 * total / count + 10_000
    read = CheckpointStore(str(tmp_path), limit=1).load(3)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    group[0].stored(3).verify(index=1, count=2)


@pytest.mark.usefixtures("small_pieces")
def test_no_share_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process's disk is full, or it is lost: the others' is not taken for a checkpoint, and the next save cleans up."""
    group, tensors = stores(tmp_path, 2), state()
    for index, store in enumerate(group):
        store.save(own(tensors, index, 2), info(1))
    for store in group:
        store.close()
    said: list[str] = []
    group[0].unwritten = said.append
    monkeypatch.setattr(checkpoint_writing, "LATEST", 0.1)
    group[0].save(own(tensors, 0, 2), info(2))
    with pytest.raises(UserError, match=r"the shares of processes 1 of 2 did not come within 0 s"):
        group[0].wait()
    assert len(said) == 1
    monkeypatch.setattr(checkpoint_writing, "LATEST", 60)
    (tmp_path / "step_00000003").mkdir()
    os.symlink("/dev/full", tmp_path / "step_00000003" / "__1_0.distcp")
    for index, store in enumerate(group):
        store.save(own(tensors, index, 2), info(3))
    with pytest.raises(UserError, match="No space left on device"):
        group[1].wait()
    with pytest.raises(UserError, match="process 1 could not write its share: No space left on device"):
        group[0].wait()
    assert group[0].steps() == [1]
    for index, store in reversed(list(enumerate(group))):
        store.save(own(tensors, index, 2), info(4))
        store.save(own(tensors, index, 2), info(4))  # stopped right after a save
    for store in reversed(group):
        store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.usefixtures("small_pieces")
def test_a_host_reads_only_the_blocks_that_its_regions_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, tensors = stores(tmp_path, 4), state()
    for index, store in reversed(list(enumerate(group))):
        store.save(own(tensors, index, 4), info(3))
    for store in group:
        store.close()
    blocks: list[Block] = []
    plain = StoredTensors._block

    def count(self: StoredTensors, name: str, stored: StoredTensor, block: Block) -> Tensor:
        blocks.append(block)
        return plain(self, name, stored, block)

    monkeypatch.setattr(StoredTensors, "_block", count)
    stored, whole = group[0].stored(3), tensors["model.embedding.weight"]
    assert shape_of(stored, "model.embedding.weight") == (400, 64)
    # Rows are stored in blocks of 100. Two devices hold the first 50, and one holds 60 columns of rows 90 to 210.
    regions: list[Region] = [((0, 0), (50, 64)), ((0, 0), (50, 64)), ((90, 4), (120, 60)), ((7, 0), (0, 64))]
    found = read_regions(stored, "model.embedding.weight", regions)
    expected = [whole[:50], whole[:50], whole[90:210, 4:], whole[:0]]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [block.offsets[0] for block in blocks] == [0, 100, 200], "each once, and the last not at all"
    assert [block.shape[0] for block in blocks] == [100, 100, 100]
    (step,) = read_regions(stored, "optimizer.step", [whole_region(())])
    assert torch.equal(step, tensors["optimizer.step"])
    # In checkpoints from before the index, checksums are of whole tensors.
    stored._checksums = {name: values_checksum(tensor) for name, tensor in tensors.items()}
    found = read_regions(stored, "model.embedding.weight", regions)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_shares_are_even_and_disjoint() -> None:
    tensors = {f"t{n}": torch.empty(1000 + n, 1000, device="meta") for n in range(7)}
    tensors |= {"norm": torch.empty(5000, device="meta"), "step": torch.empty((), device="meta")}
    for count in (1, 3, 8):
        loads, seen = [], dict[str, list[tuple[int, int]]]()
        for index in range(count):
            rows = divide_rows(tensors, index, count)
            loads.append(sum(part.of(tensors[part.name]).numel() for part in rows))
            for part in rows:
                seen.setdefault(part.name, []).append((part.start, part.stop))
        assert max(loads) < 1.1 * sum(loads) / count
        for name, tensor in tensors.items():
            parts = sorted(seen[name])
            assert parts[0][0] == 0
            assert parts[-1][1] == (tensor.shape[0] if tensor.dim() else 1)
            assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))


def test_replicas_take_turns() -> None:
    tiling = Tiling((3, 2), replicas=2)
    numbers = [tiling.number((5, 4), offsets) for offsets in ((0, 0), (0, 2), (2, 0), (2, 2), (4, 0), (4, 2))]
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert [tiling.writer(number, before=1) for number in numbers] == [1, 0, 1, 0, 1, 0]


def test_stacked_layers_are_stored_one_by_one() -> None:
    stacked = {"model.blocks.all.up.weight": torch.arange(24.0).reshape(3, 4, 2), "model.norm": torch.ones(2)}
    apart = unstack_layers(stacked)
    block = Shard("model.blocks.all.up.weight", (3, 4, 2), (1, 2, 0), stacked["model.blocks.all.up.weight"][1:, 2:])
    found = list(unstack_shards([block]))
    assert [shard.name for shard in found] == ["model.blocks.1.up.weight", "model.blocks.0.up.weight"]
    for shard in found:
        assert (shard.shape, shard.offsets) == ((4, 2), (2, 0))
        assert torch.equal(shard.block, apart[shard.name][2:])


class Stuck:
    """A file system's `open` that blocks when a file is written, as a network disk does that does not answer."""

    def __init__(self, opened: Callable[..., Any]) -> None:
        self.opened, self.answers = opened, threading.Event()

    def __call__(self, path: str, mode: str = "rb", **keywords: Any) -> Any:
        if "w" in mode:
            self.answers.wait(30)
        return self.opened(path, mode, **keywords)


def test_a_write_that_hangs_is_told_and_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = CheckpointStore(str(tmp_path), limit=1), list[str]()
    store.unwritten = said.append
    store.save(state(), info(1))
    store.wait()
    stuck = Stuck(store._folders.files.open)
    monkeypatch.setattr(store._folders.files, "open", stuck)
    store._background.patience = 0.2
    store.save(state(), info(2))
    store.check()
    assert said == []
    time.sleep(0.3)
    for _ in range(3):
        store.check()  # at every step
    assert len(said) == 1
    assert "the write of the checkpoint of step 2 makes no progress for 0 s" in said[0]
    began = time.monotonic()
    store.save(state(), info(3))  # skipped: the thread is not free
    with pytest.raises(UserError, match="step 2 makes no progress"):
        store.close()
    assert time.monotonic() - began < 5
    assert store.steps() == [1]
    threading.Timer(0.5, stuck.answers.set).start()
    assert store.is_ready(patience=30), "the last one waits"
    assert store.steps() == [2]
    store._background.patience = 60.0
    store.save(state(), info(4))
    store.close()
    assert store.steps() == [4]


def test_a_failure_is_tried_again_before_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = CheckpointStore(str(tmp_path / "c"), limit=1), list[str]()
    store.unwritten = said.append
    (tmp_path / "c").write_text("in the way")
    store.save(state(), info(1))
    while store._background.busy:
        time.sleep(0.01)
    store.check()
    assert len(said) == 1
    assert not store.owes, "not at once"
    monkeypatch.setattr("pretrain_xla.run_folder.checkpoint.RETRY", 0.0)
    assert store.owes
    (tmp_path / "c").unlink()
    store.save(state(), info(2))
    assert not store.owes
    store.close()
    assert store.steps() == [2]


def test_a_bad_state_ends_the_run_at_the_next_step(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=1)
    store.unwritten = lambda line: None
    store.save({"model.x": torch.tensor([float("nan")])}, info(1))
    while store._background.busy:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"the state after step 1 is not saved: model\.x holds NaN"):
        store.check()


def test_every_kth_is_kept(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=1, keep_interval=3)
    for step in range(1, 9):
        store.save({"x": torch.tensor(step)}, info(step, {2: 1.0}.get(step, 2.0)))
    store.close()
    assert store.steps() == [2, 3, 6, 8]


def test_only_the_asked_tensors_are_read(tmp_path: Path) -> None:
    """Damage in the optimizer's state does not keep the model from being used."""
    store = CheckpointStore(str(tmp_path), limit=1)
    store.save(state(), info(1))
    store.close()
    data = tmp_path / "step_00000001" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.index(state()["optimizer.first_moment"].numpy().tobytes()) + 5] ^= 1
    data.write_bytes(content)
    assert torch.equal(store.load(1, "model.")["model.embedding.weight"], state()["model.embedding.weight"])
    with pytest.raises(UserError, match=r"what is stored of optimizer\.first_moment is not what was written"):
        store.load(1)
    shutil.rmtree(tmp_path / "step_00000001")
