"""Write and read rates: a folder, a bucket, and what each looks like where it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pretrain_xla.doctor import storage
from pretrain_xla.doctor.storage import check_storage
from tests.servers import BUCKET, gcs_emulator

MIB = 2**20


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SLOWEST", {True: 1.0, False: 1.0})
    check = check_storage(str(tmp_path / "new" / "folder"), 3 * MIB)
    assert check.status == "ok", check
    assert check.figures["bytes"] == 3 * MIB
    assert check.figures["write_bytes_per_second"] > 0 < check.figures["read_bytes_per_second"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = check_storage(str(tmp_path / "file" / "below"), MIB)
    assert check.status == "failed"
    assert "Not a directory" in check.found
    assert "that you may write to" in check.fix
    assert os.listdir(tmp_path) == ["file"]


def test_a_slow_one_and_a_protocol_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SLOWEST", {True: 1e15, False: 1e15})
    slow = check_storage(str(tmp_path), MIB)
    assert slow.status == "failed"
    assert "choose a faster disk" in slow.fix
    unknown = check_storage("nosuch://bucket/folder", MIB)
    assert unknown.status == "failed"
    assert "nosuch" in unknown.found


def test_a_place_that_gives_back_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemoryFileSystem._open

    def damaged(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        file = real(self, path, mode, **options)
        if mode == "rb":
            file.getbuffer()[-1] ^= 1
        return file

    monkeypatch.setattr(MemoryFileSystem, "_open", damaged)
    check = check_storage("memory://doctor", MIB)
    assert check.status == "failed"
    assert "came back changed" in check.found
    assert MemoryFileSystem().find("/doctor") == []


def test_a_bucket_and_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SLOWEST", {True: 1.0, False: 1.0})
    with gcs_emulator() as address:
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": address})
        there = check_storage(f"gs://{BUCKET}/runs", MIB)
        assert there.status == "ok", there
        missing = check_storage("gs://no-such-bucket/runs", MIB)
    assert missing.status == "failed"
    assert "no-such-bucket" in missing.found
    assert "credentials" in missing.fix
