"""Line ends of Windows, and incomplete downloads in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain_xla.text.documents import open_text
from pretrain_xla.text.split import LONG_DOCUMENT, PIECE, split_document


def read(path: Path) -> list[str]:
    return [document.text for document in open_text(str(path)).read()]


def test_blank_lines_with_windows_line_ends_are_removed_at_the_ends_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["\r\n\r\none\r\ntwo\r\n", "\r\n", " three"]
    path.write_bytes(b"\r\n".join(json.dumps({"text": text}).encode() for text in texts))
    assert read(path) == ["one\r\ntwo", " three"]


def test_a_long_document_is_cut_at_blank_lines_with_any_line_ends() -> None:
    lines = [f"{number} {'word ' * 30}\n" + "\n" * (number % 20 == 19) for number in range(2 * LONG_DOCUMENT // 150)]
    document = "".join(lines)
    windows = document.replace("\n", "\r\n")
    parts = list(split_document(windows, 0.5))
    assert len(parts) > 2
    assert "".join(text for _, text in parts) == windows
    assert all(text.endswith("\r\n\r\n") and len(text) >= PIECE for _, text in parts[:-1])


def test_incomplete_downloads_are_left_out_of_a_folder_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("whole")
    for name in ("b.txt.part", "c.jsonl.incomplete", "d.txt.crdownload", "a.txt~"):
        (tmp_path / name).write_text('{"text": "ha')
    assert read(tmp_path) == ["whole"]
    assert "4 of 5 files left out: half of a file or a copy, by its name: a.txt~, b.txt.part" in caplog.text
    assert read(tmp_path / "b.txt.part") == ['{"text": "ha'], "who names a file means it"
