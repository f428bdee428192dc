"""A source of documents: a name, a version, and a way to read them from any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pretrain_xla.text.documents import Document


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once."""

    name: str
    """The name that the user gave."""
    version: str
    """Changes whenever the documents may have changed; `prepare` sees by it whether a dataset is up to date."""
    read: Callable[[Any], Iterator[Document]]
    """The documents after a place (None means from the first one), in the same order every time."""
    skipped: Callable[[], int] = lambda: 0
    """How many bad documents have been skipped so far."""

    def documents(self) -> Iterator[str]:
        """The text of every document."""
        return (document.text for document in self.read(None))
