"""A Git LFS pointer in place of a file: every reader of such a file refuses it and names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain_xla.data.shards import open_shard
from pretrain_xla.errors import UserError
from pretrain_xla.interop.load import load_model
from pretrain_xla.storage.files import filesystem
from pretrain_xla.text.documents import open_text
from pretrain_xla.tokenizers.load import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        *((name, open_text) for name in ("a.txt", "a", "a.jsonl", "a.jsonl.zst", "a.parquet", "a.csv", "a.tar")),
        *((name, load_tokenizer) for name in ("tokenizer.json", "tokenizer.model")),
        *((name, load_model) for name in ("a.safetensors", "a.pt")),
        ("config.json", lambda path: load_model(str(Path(path).parent))),
        *((name, lambda path: open_shard(*filesystem(path))) for name in ("train.bin", "train.npy")),
    ],
)
def test_a_pointer_is_not_read_as_the_file(name: str, read: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match="is only a Git LFS pointer to the file: run `git lfs install`") as refused:
        read(str(tmp_path / name))
    assert str(tmp_path / name) in str(refused.value)


def test_one_pointer_among_documents_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text(POINTER)
    with pytest.raises(UserError, match=r"b\.txt: is only a Git LFS pointer"):
        open_text(str(tmp_path))


def test_a_text_that_quotes_a_pointer_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"A pointer is\n{POINTER}")
    (document,) = open_text(str(tmp_path / "a.txt")).read()
    assert document.text.endswith("size 12345")
