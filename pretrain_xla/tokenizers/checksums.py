"""Checksums of the files of a tokenizer that a dataset or a run keeps, in the form of `sha256sum`.

A fingerprint covers only what one text needs (see `fingerprint`), and misses a damaged entry of a rare word. A tokenizer of the
user's own has no such file, and is not compared. Nor is an export: other programs rewrite its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, remove, write_atomically
from pretrain_xla.tokenizers.tokenizer import SPECIALS_FILE, TOKENIZER_FILES

CHECKSUMS_FILE = "SHA256SUMS"
_FILES = (*TOKENIZER_FILES, SPECIALS_FILE, "tokenizer_config.json", "generation_config.json")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S+)")


@contextlib.contextmanager
def recording_checksums(folder: str) -> Iterator[None]:
    """Record the checksums of the tokenizer that is written to a folder meanwhile.

    Raises:
        UserError: the folder cannot be written.
    """
    fs, root = filesystem(folder)
    remove(fs, [f"{root}/{CHECKSUMS_FILE}"])
    yield
    there = [name for name in _FILES if fs.isfile(f"{root}/{name}")]
    lines = "".join(f"{_sha256(fs, root, name)}  {name}\n" for name in there)
    write_atomically(fs, f"{root}/{CHECKSUMS_FILE}", [lines.encode()])


def check_checksums(name: str, fs: Any, folder: str) -> None:
    """Compare the files of a tokenizer with the checksums in its folder, if there are any.

    Args:
        name: of the tokenizer, for messages.
        fs: an fsspec file system.
        folder: the tokenizer's folder on it.

    Raises:
        UserError: a file differs, or is missing.
    """
    path = f"{folder}/{CHECKSUMS_FILE}"
    if not fs.isfile(path):
        return
    text = fs.cat_file(path).decode("utf-8", "replace")
    for expected, file in _LINE.findall(text):
        if file not in _FILES:
            continue
        if not fs.isfile(f"{folder}/{file}") or _sha256(fs, folder, file) != expected:
            raise UserError(
                f"tokenizer {name!r}: {folder}/{file} is missing, or differs from its checksum in {CHECKSUMS_FILE}: copy the "
                f"folder again; after a change by hand, remove {CHECKSUMS_FILE}"
            )


def _sha256(fs: Any, folder: str, file: str) -> str:
    return hashlib.sha256(fs.cat_file(f"{folder}/{file}")).hexdigest()
