"""Opens a source of documents by its name, and joins several sources to one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.text.corpus import QUICKSTART, quickstart_documents, quickstart_version
from pretrain_xla.text.documents import Document, open_text
from pretrain_xla.text.hub import hub_source
from pretrain_xla.text.reading import Reading
from pretrain_xla.text.source import Source


def source_of(name: str, version: str, texts: Callable[[], Iterable[str]]) -> Source:
    """A source made of a function; resuming after a place reads the documents before it again.

    Args:
        name: the name that the user gives.
        version: see `Source.version`.
        texts: returns the documents, from the first one, in the same order every time.
    """

    def read(place: int | None) -> Iterator[Document]:
        documents = (Document(text, number) for number, text in enumerate(texts(), start=1))
        return itertools.islice(documents, place or 0, None)

    return Source(name, version, read)


def open_source(
    name: str,
    *,
    text_column: str = "text",
    streaming: bool = False,
    cache_dir: str | None = None,
    document_per_line: bool = False,
    skip_bad_documents: bool = False,
) -> Source:
    """The source that a name stands for.

    Args:
        name: `quickstart`; the path, pattern or URL of text (see `open_text`); or `hf:DATASET[:CONFIG[:SPLIT]]`.
        text_column: key or column that holds the text, in files of records and datasets; `a.b` for `b` within `a`.
        streaming: for `hf:`, read over the network instead of downloading first.
        cache_dir: for `hf:`, where downloads are kept.
        document_per_line: for text files, whether each line is a document.
        skip_bad_documents: for files, whether to go on after a document that cannot be read.

    Raises:
        UserError: there is nothing of that name.
    """
    if name == QUICKSTART:
        return source_of(name, quickstart_version(), quickstart_documents)
    if name.startswith("hf:") and not name.startswith("hf://"):  # hf:// is a file on the Hub
        return hub_source(name, text_column=text_column, streaming=streaming, cache_dir=cache_dir)
    text = open_text(name, Reading(text_column, document_per_line, skip_bad_documents))
    version = text.version + ("" if text_column == "text" else f":{text_column}")
    return Source(name, version, text.read, lambda: text.bad.count)


def join_sources(sources: Sequence[Source], weights: Sequence[float] = (), max_documents: int | None = None) -> Source:
    """One source made of several.

    Without weights, one source after the other. With weights, the next document comes from the source that is furthest below
    its share of the characters so far, until the first source ends. So the shares hold for the whole result.

    Args:
        sources: at least one.
        weights: one for each source, in any unit. None means all of each.
        max_documents: stop after this many.

    Raises:
        UserError: weights that do not match the sources, or max_documents < 1.
    """
    if weights and (len(weights) != len(sources) or min(weights) <= 0):
        raise UserError(f"weights={list(weights)}: give one over 0 for each of the {len(sources)} sources")
    if max_documents is not None and max_documents < 1:
        raise UserError(f"max_documents={max_documents}: ask for at least 1")

    def skipped() -> int:
        return sum(source.skipped() for source in sources)

    joined = sources[0]
    if len(sources) > 1:
        read = functools.partial(_mix, sources, weights) if weights else functools.partial(_chain, sources)
        version = " + ".join(source.version for source in sources)
        shares = f" by {':'.join(f'{weight:g}' for weight in weights)}" if weights else ""
        joined = Source(" + ".join(source.name for source in sources), version + shares, read, skipped)
    if max_documents is None:
        return joined
    version = f"{joined.version}, first {max_documents}"
    return Source(joined.name, version, functools.partial(_first, joined, max_documents), skipped)


def _chain(sources: Sequence[Source], place: Sequence[Any] | None) -> Iterator[Document]:
    number, inner = place or (0, None)
    for index in range(number, len(sources)):
        for document in sources[index].read(inner if index == number else None):
            share = None if document.share is None else (index + document.share) / len(sources)
            yield Document(document.text, [index, document.place], share)


def _mix(sources: Sequence[Source], weights: Sequence[float], place: Sequence[Any] | None) -> Iterator[Document]:
    """A place holds the place of each source and the characters taken from each."""
    places, taken = (list(part) for part in place) if place else ([None] * len(sources), [0] * len(sources))
    readers = [source.read(inner) for source, inner in zip(sources, places, strict=True)]
    shares: list[float | None] = [None] * len(sources)
    while True:
        index = min(range(len(sources)), key=lambda number: taken[number] / weights[number])
        document = next(readers[index], None)
        if document is None:
            return
        taken[index] += len(document.text)
        places[index], shares[index] = document.place, document.share
        known = [share for share in shares if share is not None]
        yield Document(document.text, [list(places), list(taken)], max(known, default=None))


def _first(source: Source, count: int, place: Sequence[Any] | None) -> Iterator[Document]:
    done, inner = place or (0, None)
    for number, document in enumerate(itertools.islice(source.read(inner), count - done), start=done + 1):
        yield Document(document.text, [number, document.place], max(number / count, document.share or 0))
