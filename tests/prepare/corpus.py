"""Documents for the tests of `prepare`."""

from __future__ import annotations

from pathlib import Path

from pretrain_xla.text.sources import source_of

DOCUMENTS = [f"Document {number} says <|endoftext|> and naïve things. " * (number % 7 + 1) for number in range(400)]


def source(documents=DOCUMENTS, version="1"):
    return source_of("test", version, lambda: documents)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
