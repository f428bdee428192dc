"""Checkpoints: bit-exact, complete or absent, pruned safely; damage is reported."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pretrain_xla
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint import MARKER, CheckpointInfo, CheckpointStore, DamagedCheckpoint
from pretrain_xla.run_folder.checkpoint_open import open_checkpoint
from pretrain_xla.run_folder.checkpoint_reading import values_checksum
from pretrain_xla.storage.checked_json import parse_intact, with_checksum

CONFIG = {"model": {"d_model": 8}}


def state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every dtype that a run saves, and some more."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embedding.weight": torch.randn(7, 5, generator=generator),
        "model.bf16": torch.randn(9, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(seed + 3, dtype=torch.int32),
        "optimizer.first_moment.odd": torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max]),
        "big": torch.tensor([2**62 + 1, -1]),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(4, 6, generator=generator).T,
    }


def info(step: int, loss: float | None = None) -> CheckpointInfo:
    return CheckpointInfo(step=step, valid_loss=loss, data="fingerprint", config=CONFIG)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in ((one[k], other[k]) for k in one)
    )


@pytest.fixture(params=["disk", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that does not exist yet, on disk and at a URL."""
    if request.param == "disk":
        yield str(tmp_path / "run" / "checkpoints")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield f"{url}/run/checkpoints"
    files, path = fsspec.core.url_to_fs(url)
    if files.exists(path):
        files.rm(path, recursive=True)


@pytest.fixture
def store(root: str) -> Iterator[CheckpointStore]:
    """An empty store there that keeps two checkpoints."""
    store = CheckpointStore(root, limit=2)
    yield store
    store.close()


def save(store: CheckpointStore, *losses: float | None, first: int = 1) -> None:
    for step, loss in enumerate(losses, start=first):
        store.save(state(step), info(step, loss))
    store.wait()


def test_a_loaded_checkpoint_is_bit_for_bit_the_saved_one(store: CheckpointStore) -> None:
    saved = state()
    store.save(saved, info(12, 3.25))
    store.wait()
    assert same(store.load(12), saved)
    assert replace(store.info(12), index=None, code=None) == info(12, 3.25)
    assert store.folder(12) == f"{store.root}/step_00000012"


def test_a_new_store_is_empty(store: CheckpointStore) -> None:
    assert store.steps() == []
    assert store.newest() is None
    assert store.best() is None
    store.wait()


def test_another_store_finds_them_in_order(store: CheckpointStore, root: str) -> None:
    save(store, 3.0, 2.0)
    other = CheckpointStore(f"{root}/", limit=9)
    assert other.steps() == [1, 2]
    assert (other.newest(), other.best()) == (2, 2)
    assert same(other.load(1), state(1))


def test_a_folder_without_its_marker_is_not_a_checkpoint(store: CheckpointStore, root: str) -> None:
    save(store, 3.0, 2.0)
    files, path = fsspec.core.url_to_fs(root)
    files.rm(f"{path}/step_00000002/{MARKER}")
    for name in ("step_00000009", "step_x", "notes"):
        files.makedirs(f"{path}/{name}", exist_ok=True)
        files.touch(f"{path}/{name}/left_behind")
    assert (store.steps(), store.newest(), store.best()) == ([1], 1, 1)
    assert open_checkpoint(root)[1] == 1
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(f"{root}/step_00000002")
    save(store, 1.0, first=2)  # over the files of the interrupted write
    assert store.newest() == 2
    assert same(store.load(2), state(2))


def test_the_newest_and_the_best_are_kept(store: CheckpointStore, root: str) -> None:
    save(store, 3.0, 1.0, 2.0, None, 2.5)
    assert store.steps() == [2, 4, 5]
    assert (store.newest(), store.best()) == (5, 2)
    files, path = fsspec.core.url_to_fs(root)
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False))
    assert names == ["step_00000002", "step_00000004", "step_00000005"], "the others are removed completely"
    save(store, 0.5, 0.5, first=6)
    assert store.steps() == [6, 7]
    assert store.best() == 6, "the first of two equal ones"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(losses=st.lists(st.none() | st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=6), limit=st.integers(1, 3))
def test_pruning_keeps_the_newest_and_the_best_of_all(losses: list[float | None], limit: int, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / uuid.uuid4().hex), limit)
    for step, loss in enumerate(losses, start=1):
        store.save({"x": torch.tensor(step)}, info(step, loss))
    store.close()
    measured = [(loss, step) for step, loss in enumerate(losses, start=1) if loss is not None]
    best = {min(measured)[1]} if measured else set()
    assert set(store.steps()) == set(range(1, len(losses) + 1)[-limit:]) | best


def test_a_nan_loss_is_never_the_best(store: CheckpointStore) -> None:
    save(store, 3.0, 2.0, float("nan"))
    assert store.best() == 2


def test_every_way_to_name_a_checkpoint(store: CheckpointStore, root: str) -> None:
    save(store, 1.0, 2.0)
    run = root.removesuffix("/checkpoints")
    for path in (run, f"{run}/", root, f"{root}/"):
        for which, step in (("newest", 2), ("best", 1)):
            opened, found = open_checkpoint(path, which)
            assert found == step
            assert same(opened.load(found), state(step))
    for path in (f"{root}/step_00000001", f"{root}/step_00000001/"):
        for which in ("newest", "best"):
            assert open_checkpoint(path, which)[1] == 1


def test_without_a_measured_loss_the_best_is_the_newest(store: CheckpointStore, root: str) -> None:
    save(store, None, None)
    messages: list[str] = []
    assert open_checkpoint(root, "best", messages.append)[1] == 2
    assert messages == [f"{root}: no checkpoint has a measured validation loss: using the newest, of step 2"]
    assert open_checkpoint(root, "newest", messages.append)[1] == 2
    assert len(messages) == 1


def test_a_step_folder_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(CheckpointStore(str(tmp_path), limit=2), 1.0)
    monkeypatch.chdir(tmp_path)
    opened, step = open_checkpoint("step_00000001")
    assert same(opened.load(step), state(1))


def test_paths_without_a_checkpoint(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("x")
    for path in (root, f"{root}/step_00000001", str(tmp_path), str(tmp_path / "file")):
        with pytest.raises(UserError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: no complete checkpoint there")


def test_a_url_with_an_unknown_protocol() -> None:
    with pytest.raises(UserError, match="checkpoints_dir=qq://bucket/c: Protocol not known: qq"):
        CheckpointStore("qq://bucket/c", limit=1)


def test_a_loss_from_another_step_does_not_count(tmp_path: Path) -> None:
    """Version 1 repeated the last loss: it counts only at a step at which the run's settings make a validation."""
    config = CONFIG | {"train": {"valid_interval": 4, "train_steps": 7}}
    store = CheckpointStore(str(tmp_path), limit=9)
    for step, loss in {4: 3.0, 5: 3.0, 6: 1.0, 7: 2.0}.items():
        store.save(state(step), replace(info(step, loss), config=config, version=1))
    store.close()
    assert CheckpointStore(str(tmp_path), limit=1).losses() == {4: 3.0, 5: None, 6: None, 7: 2.0}
    assert open_checkpoint(str(tmp_path), "best")[1] == 7


def test_a_measured_loss_is_not_pruned_for_unmeasured_ones(store: CheckpointStore) -> None:
    save(store, 3.0, None, None, None)
    assert (store.best(), store.steps()) == (1, [1, 3, 4])


def truncate(path: Path, to: int) -> None:
    os.truncate(path, to)


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def flip_a_bit(folder: Path) -> None:
    """Flip a bit of the embedding's values, which changes neither the archive's format nor its size."""
    content = bytearray(data_file(folder).read_bytes())
    content[content.index(state(2)["model.embedding.weight"].numpy().tobytes()) + 17] ^= 4
    data_file(folder).write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut data": lambda folder: truncate(data_file(folder), 200),
    "empty data": lambda folder: truncate(data_file(folder), 0),
    "no data": lambda folder: data_file(folder).unlink(),
    "overwritten data": lambda folder: data_file(folder).write_bytes(b"\0" * data_file(folder).stat().st_size),
    "one bit": flip_a_bit,
    "cut metadata": lambda folder: truncate(folder / ".metadata", 60),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_folder_and_the_fix(damage: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=2)
    save(store, 2.0, 1.0)
    DAMAGE[damage](tmp_path / "step_00000002")
    with pytest.raises(UserError) as caught:
        store.load(2)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/step_00000002 is damaged")
    assert "remove that folder" in line
    assert "\n" not in line
    assert same(store.load(1), state(1)), "the older one is intact"


def make_old(folder: Path, checksums: bool) -> None:
    """Rewrite a checkpoint as one of version 2 (with checksums of its tensors) or 1, written by DCP itself."""
    tree = parse_intact((folder / MARKER).read_bytes())
    tensors = CheckpointStore(str(folder.parent), limit=1).load(tree["step"])
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)
    old = {name: tree[name] for name in ("step", "valid_loss", "data", "config")} | {"version": 2 if checksums else 1}
    if checksums:
        old |= {"checksums": {name: values_checksum(tensor) for name, tensor in tensors.items()}}
    (folder / MARKER).write_text(json.dumps(old))


@pytest.mark.parametrize("checksums", [True, False])
def test_older_checkpoints_load(checksums: bool, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 1.0)
    folder = tmp_path / "step_00000001"
    make_old(folder, checksums)
    assert same(store.load(1), state(1))
    assert store.load(1, "model.").keys() == {"model.embedding.weight", "model.bf16"}
    store.stored(1).verify()
    if checksums:
        content = bytearray(data_file(folder).read_bytes())
        content[content.index(state(1)["model.embedding.weight"].numpy().tobytes()) + 17] ^= 4
        data_file(folder).write_bytes(content)
        for read in (lambda: store.load(1), lambda: store.stored(1).verify()):
            with pytest.raises(DamagedCheckpoint, match=r"step_00000001 is damaged \("):
                read()


def test_dcp_itself_reads_a_checkpoint(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path), limit=1), 1.0)
    read = {name: torch.empty_like(tensor) for name, tensor in state(1).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(read, checkpoint_id=str(tmp_path / "step_00000001"), no_dist=True)
    assert same(read, state(1))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"step": 2}', b'{"step": 2, "surprise": 1}'])
def test_a_damaged_marker(content: bytes, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=2)
    save(store, 2.0)
    (tmp_path / "step_00000001" / MARKER).write_bytes(content)
    with pytest.raises(UserError) as caught:
        store.info(1)
    assert str(caught.value).startswith(f"{tmp_path}/step_00000001/{MARKER} cannot be read")
    assert "\n" not in str(caught.value)


def test_no_byte_of_a_marker_or_an_index_changes_unnoticed(tmp_path: Path) -> None:
    """Not even one of the white space between values."""
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 1.0)
    for name in (MARKER, "index.json"):
        path = tmp_path / "step_00000001" / name
        content = path.read_bytes()
        for changed in (content.replace(b"  ", b" ", 1), content.replace(b"\n", b"\t\n", 1), content + b"\n"):
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpoint):
                CheckpointStore(str(tmp_path), limit=1).load(1)
        path.write_bytes(content)
    assert same(CheckpointStore(str(tmp_path), limit=1).load(1), state(1))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"step": 2}', b'{"step": 1, "data": 2}'])
def test_a_damaged_marker_does_not_affect_other_checkpoints(content: bytes, root: str) -> None:
    save(CheckpointStore(root, limit=9), 3.0, 2.0, 1.0)
    files, path = fsspec.core.url_to_fs(root)
    for step in (1, 3):
        files.pipe_file(f"{path}/step_{step:08d}/{MARKER}", content)
    messages: list[str] = []
    store, step = open_checkpoint(root, "newest", messages.append)
    assert step == 2
    assert len(messages) == 1
    assert messages[0].startswith(f"{root}/step_00000003/{MARKER} cannot be read (")
    assert messages[0].endswith("so that checkpoint is skipped for that of step 2")
    with pytest.raises(UserError, match=f"step_00000003/{MARKER} cannot be read"):
        open_checkpoint(f"{root}/step_00000003")
    store = CheckpointStore(root, limit=1)
    save(store, 2.5, 2.25, first=3)  # overwrites the newer one and leaves the older one
    store.close()
    assert store.steps() == [2, 4]
    assert files.exists(f"{path}/step_00000001/.metadata"), "its data may be intact, and the user may want it"
    for step in (2, 4):
        files.pipe_file(f"{path}/step_{step:08d}/{MARKER}", content)
    with pytest.raises(UserError, match="and there is no other"):
        open_checkpoint(root)


def test_a_later_versions_checkpoint_is_not_skipped(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=9)
    save(store, 3.0, 2.0)
    marker = tmp_path / "step_00000002" / MARKER
    tree = parse_intact(marker.read_bytes())
    marker.write_bytes(with_checksum(tree | {"surprise": 1}))
    with pytest.raises(UserError, match="a later version of pretrain_xla wrote it: surprise is not known here"):
        open_checkpoint(str(tmp_path))


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def test_a_marker_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker comes last; its content is on disk before it has its name, and a kill before that leaves no checkpoint."""
    done: list[str] = []
    fsync, replaced = os.fsync, shutil.move

    def sync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def move(source: str, target: str) -> Any:
        done.append(f"named {os.path.basename(target)}")
        return replaced(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "move", move)
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 1.0)
    folder = "step_00000001"
    assert done[-5:] == [folder, f"{MARKER}.partial", f"named {MARKER}", folder, tmp_path.name]

    def killed(source: str, target: str) -> Any:
        raise Killed

    monkeypatch.setattr(shutil, "move", killed)
    store.save(state(2), info(2))
    with pytest.raises(Killed):
        store.wait()
    assert (store.steps(), open_checkpoint(str(tmp_path))[1]) == ([1], 1)
    monkeypatch.undo()
    save(store, None, first=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"], (
        "and leftovers are removed"
    )


def test_the_users_files_are_kept(tmp_path: Path) -> None:
    """An incomplete checkpoint is removed unless the user's files are in it; of a link, only the link is removed."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    store = CheckpointStore(str(elsewhere), limit=9)
    save(store, None, None)
    for step in (1, 2, 5):
        (root / f"step_{step:08d}").parent.mkdir(exist_ok=True)
        (root / f"step_{step:08d}").symlink_to(elsewhere / f"step_{step:08d}")  # the last one is dangling
    for step, name in ((3, "__0_0.distcp"), (4, "notes.txt")):
        (root / f"step_{step:08d}").mkdir()
        (root / f"step_{step:08d}" / name).write_text("x")
    linked = CheckpointStore(str(root), limit=1)
    assert linked.newest() == 2
    save(linked, None, first=5)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000004", "step_00000005"]
    assert not (root / "step_00000005").is_symlink()
    assert store.steps() == [1, 2]
    assert same(store.load(1), state(1)), "the link's target is intact"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_not_saved(value: float, dtype: torch.dtype, store: CheckpointStore) -> None:
    save(store, 2.0)
    with_nan = state(2) | {"optimizer.second_moment.x": torch.tensor([[1.0, value]], dtype=dtype)}
    store.save(with_nan, info(2, 1.0))
    with pytest.raises(UserError) as caught:
        store.wait()
    assert str(caught.value).startswith(
        "the state after step 2 is not saved: optimizer.second_moment.x holds NaN or infinity in 1 of 2 places; lower"
    )
    assert str(caught.value).endswith("the newest one is that of step 1")
    assert (store.steps(), store.best()) == ([1], 1)


def assert_write_failed(error: UserError, root: Path) -> None:
    assert str(error).startswith(f"{root}: the checkpoint of step ")
    assert "could not be written" in str(error)
    assert "earlier ones are complete" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("call", ["wait", "save", "close"])
def test_a_failed_write_is_reported_at_the_next_call(call: str, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = CheckpointStore(str(root), limit=5)
    save(store, 2.0)
    moved = root.rename(tmp_path / "moved")
    root.write_text("in the way")  # tests may run as root, who may write everywhere
    store.save(state(2), info(2))
    calls: dict[str, Callable[[], None]] = {
        "wait": store.wait,
        "save": lambda: store.save(state(3), info(3)),
        "close": store.close,
    }
    with pytest.raises(UserError) as caught:
        calls[call]()
    assert_write_failed(caught.value, root)
    root.unlink()
    moved.rename(root)
    assert store.steps() == [1]
    assert same(store.load(1), state(1))
    if call != "close":
        save(store, 1.0, first=2)  # reported once; without the cause it continues
        assert store.steps() == [1, 2]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Writing a file of more than 100 kB fails, much as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WIDE = {"model.wide": torch.zeros(100_000)}


def test_a_step_that_is_saved_twice_is_not_lost(tmp_path: Path) -> None:
    # A run that is stopped just after saving saves the same step again; that must not put the first save at risk.
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 2.0)
    with full_disk(), contextlib.suppress(UserError):
        store.save(WIDE, info(1, 2.0))
        store.wait()
    assert store.steps() == [1]
    assert same(store.load(1), state(1))


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 2.0)
    with full_disk():
        store.save(WIDE, info(2, 1.0))
        with pytest.raises(UserError) as caught:
            store.wait()
    assert_write_failed(caught.value, tmp_path)
    assert "could not be written (File too large: raise the limit" in str(caught.value), (
        "not PyTorch's own: unexpected pos 704 vs 598"
    )
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_00000001"], "an incomplete one would take up space"
    assert store.steps() == [1]
    assert same(store.load(1), state(1))
    save(store, 1.0, first=2)
    assert store.steps() == [2]


def test_a_run_may_continue_after_a_failed_write(tmp_path: Path) -> None:
    store, said = CheckpointStore(str(tmp_path), limit=5), list[str]()
    store.unwritten = said.append
    with full_disk():
        store.save(WIDE, info(1))
        while store._background.busy:
            time.sleep(0.01)
        assert len(said) == 1, "reported at once"
        assert "the checkpoint of step 1 could not be written (File too large" in said[0]
        assert said[0].endswith("another is tried in 60 s, or when it is due")
    store.save(state(2), info(2))
    store.wait()
    assert store.steps() == [2]
    with full_disk():
        store.save(WIDE, info(3))
        with pytest.raises(UserError, match="step 3 could not be written"):
            store.close()  # the last one must not fail silently


def test_running_out_of_memory_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path), limit=1)
    save(store, 2.0)

    def empty(*_: Any, **__: Any) -> None:
        torch.zeros(1).resize_(2**58)

    monkeypatch.setattr("pretrain_xla.run_folder.checkpoint_reading.unpacked", empty)
    with pytest.raises(UserError, match="cannot be read: the host is out of memory") as caught:
        store.load(1)
    assert "damaged" not in str(caught.value)


def test_the_marker_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path), limit=1), 2.5)
    marker = json.loads((tmp_path / "step_00000001" / MARKER).read_text())
    assert marker.pop("seen") is marker.pop("tokenizer") is None
    assert isinstance(marker.pop("index"), int)
    assert isinstance(marker.pop("checksum"), str)
    assert marker.pop("code") == f"pretrain_xla {pretrain_xla.__version__}, torch {torch.__version__}"
    assert marker == {"step": 1, "valid_loss": 2.5, "data": "fingerprint", "config": CONFIG, "version": 3}
