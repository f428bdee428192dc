"""Where documents come from, as `prepare` sees it: a name, a version, and a way to read them from the start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretrain_xla.data.corpus import QUICKSTART, quickstart_documents, quickstart_version
from pretrain_xla.data.documents import files_version, read_documents


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once."""

    name: str
    """What a person calls it."""
    version: str
    """Another string whenever the documents may be others; how `prepare` knows that a dataset is up to date."""
    documents: Callable[[], Iterator[str]]
    """The documents, from the first one, in the same order every time."""


def open_source(name: str) -> Source:
    """The source that a name stands for: `quickstart`, or the path or URL of a file or folder of text.

    Raises:
        UserError: nothing there.
    """
    if name == QUICKSTART:
        return Source(name, quickstart_version(), lambda: iter(quickstart_documents()))
    return Source(name, files_version(name), functools.partial(read_documents, name))
