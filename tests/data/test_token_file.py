"""Shards that vanish, shrink or change while a run reads them: a clear line, or the same batches as before; never SIGBUS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.sources import source_of


def begun(folder: Path) -> Batches:
    """A run that has read its first batch."""
    made = Batches(open_dataset(str(folder), 64, 257), sequences_per_batch=32, seq_length=64, seed=3)
    made.rows(0)
    return made


def the_rest(made: Batches) -> list[np.ndarray]:
    return [made.rows(step) for step in range(made.sequences_per_epoch // 32)]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A shard of another program, without checksums; larger than a page."""
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards" / "0.npy", (np.arange(50_000) * 7 % 257).astype(np.uint16))
    return tmp_path / "shards" / "0.npy"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A shard whose checksum is in dataset.json."""
    documents = [f"document {number} " * 40 for number in range(200)]
    prepare(source_of("test", "1", lambda: documents), str(tmp_path / "d"), "bytes", valid_fraction=0.1)
    return tmp_path / "d" / "train" / "000000.npy"


def shorten(path: Path) -> None:
    os.truncate(path, 5000)


def overwrite(path: Path) -> None:
    """In place, with other ids of the same vocabulary."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\1\0" * 5000)


@pytest.mark.parametrize(("change", "expected"), [(shorten, "was truncated|was changed"), (overwrite, "was changed")])
def test_a_shard_that_changes_during_the_run(change: Callable[[Path], None], expected: str, foreign: Path) -> None:
    made = begun(foreign.parent)
    change(foreign)
    with pytest.raises(UserError, match=rf"0\.npy: ({expected}) while the run reads it: put it back, then") as error:
        the_rest(made)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [shorten, overwrite])
def test_a_shard_with_a_checksum_that_changes_during_the_run(change: Callable[[Path], None], prepared: Path) -> None:
    made = begun(prepared.parent)
    change(prepared)
    with pytest.raises(UserError, match=r"000000\.npy: (was (changed|truncated)|differs from its checksum)"):
        the_rest(made)


def test_a_shard_that_is_copied_over_with_the_same_content(prepared: Path) -> None:
    """The checksum tells that it is the same."""
    made, content = begun(prepared.parent), prepared.read_bytes()
    expected = the_rest(made)
    prepared.write_bytes(content)
    os.utime(prepared, ns=(1, 1))
    for rows, before in zip(the_rest(made), expected, strict=True):
        np.testing.assert_array_equal(rows, before)


def test_a_shard_that_is_deleted(foreign: Path) -> None:
    """An open one is read to its end. One that is not yet open, or no longer, is named."""
    made = begun(foreign.parent)
    expected = the_rest(made)
    foreign.unlink()
    for rows, before in zip(the_rest(made), expected, strict=True):
        np.testing.assert_array_equal(rows, before)
    made.dataset.loader.plan([], [])  # the window has passed
    with pytest.raises(
        UserError, match=r"0\.npy: existed when the run started and is gone: put it back, then the same"
    ):
        made.rows(0)


@pytest.mark.parametrize("same", [True, False])
def test_a_shard_that_is_replaced_before_it_is_opened(same: bool, prepared: Path) -> None:
    made, content = begun(prepared.parent), bytearray(prepared.read_bytes())
    expected = made.rows(0)
    made.dataset.loader.plan([], [])
    content[-1] ^= not same
    prepared.with_suffix(".new").write_bytes(content)
    prepared.with_suffix(".new").rename(prepared)
    if same:
        np.testing.assert_array_equal(made.rows(0), expected)
    else:
        with pytest.raises(UserError, match="differs from its checksum"):
            made.rows(0)


def test_a_disk_that_fails(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    made = begun(foreign.parent)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"0\.npy: cannot be read: Input/output error: fix that, then the same command"):
        made.rows(0)
