"""A source of documents: a name, a version, and a way to read them from any place on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pretrain_xla.text.documents import Document


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once."""

    name: str
    """The name by which the user asks for it."""
    version: str
    """Another string whenever the documents may be others; how `prepare` knows that a dataset is up to date."""
    read: Callable[[Any], Iterator[Document]]
    """The documents after a place (None means from the first one), in the same order every time."""
    skipped: Callable[[], int] = lambda: 0
    """How many bad documents have been skipped in all that was read of it so far."""

    def documents(self) -> Iterator[str]:
        """The text of every document."""
        return (document.text for document in self.read(None))
