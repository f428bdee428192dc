"""Documents → token arrays on all cores, in the order of the documents.

One process reads, the others cut, hash and encode. Chunks of about a million characters go out by pipe and come back as
arrays of ids; a few are under way for each worker, so that none waits for the reader while the reader keeps up, and what
comes back is used in the order in which it went out. So the result does not depend on how many workers there are.
"""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from pretrain_xla.data.manifest import SPLITS
from pretrain_xla.data.shards import dtype_for
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.encode import document_encoder
from pretrain_xla.text.documents import Document
from pretrain_xla.text.split import split_document
from pretrain_xla.tokenizers.tokenizer import Tokenizer

_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 2**20, 4096
_ALONE = 4  # chunks that are encoded before any process is started: a small corpus is done by then
_AHEAD = 3  # chunks under way for each worker


@dataclass(frozen=True)
class Encoded:
    """The tokens of one split in a chunk."""

    tokens: np.ndarray
    """End-of-text after each document; of the type that the vocabulary is stored in."""
    documents: int


@dataclass(frozen=True)
class Chunk:
    """A stretch of the documents, encoded."""

    splits: dict[str, Encoded]
    last: Document
    """The last document; its `place` is where to go on after this chunk."""


class ChunkEncoder:
    """What a worker does: texts → tokens of each split."""

    def __init__(self, tokenizer: Tokenizer, valid_fraction: float, seed: int) -> None:
        self._encode = document_encoder(tokenizer)
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._valid_fraction, self._seed = valid_fraction, seed

    def encode(self, texts: Sequence[str]) -> dict[str, Encoded]:
        """Split and encode so many documents."""
        parts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in texts:
            for split, part in split_document(text, self._valid_fraction, self._seed):
                parts[split].append(part)
        return {split: Encoded(self._encode(part).astype(self._dtype), len(part)) for split, part in parts.items()}


def encode_chunks(
    documents: Iterable[Document], tokenizer: Tokenizer, valid_fraction: float, seed: int, num_workers: int
) -> Generator[Chunk, None, None]:
    """Encode documents on several cores; closing the iterator ends the processes.

    Args:
        documents: in the order in which their tokens come out.
        tokenizer: anything that can be pickled.
        valid_fraction: see `split_document`.
        seed: see `split_document`.
        num_workers: processes that encode; with 1, this one does it all.

    Raises:
        UserError: a worker was killed; or as `documents` does.
    """
    chunks = _chunks(documents)
    encoder = ChunkEncoder(tokenizer, valid_fraction, seed)
    for chunk in chunks if num_workers == 1 else itertools.islice(chunks, _ALONE):
        yield Chunk(encoder.encode([document.text for document in chunk]), chunk[-1])
    first = next(chunks, None)
    if first is not None:
        arguments = (tokenizer, valid_fraction, seed)
        yield from _in_processes(itertools.chain([first], chunks), encoder, arguments, num_workers)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _in_processes(
    chunks: Iterator[list[Document]], encoder: ChunkEncoder, arguments: tuple[Any, ...], num_workers: int
) -> Iterator[Chunk]:
    # Not forked from this process: it may have threads, and what they hold locked would stay so in a copy.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_workers, context, _begin, arguments)
    under_way: collections.deque[tuple[Future[dict[str, Encoded]], Document]] = collections.deque()
    begun = False
    try:
        for chunk in chunks:
            texts, last = [document.text for document in chunk], chunk[-1]
            begun = begun or (len(under_way) >= num_workers and under_way[0][0].done())
            if begun or len(under_way) < num_workers:
                under_way.append((pool.submit(_encode, texts), last))
            else:  # it takes a second until the processes are there
                under_way.append((_done(encoder.encode(texts)), last))
            while len(under_way) >= _AHEAD * num_workers:
                yield _result(*under_way.popleft())
        while under_way:
            yield _result(*under_way.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (most often for want of memory): give the same command again to go on; "
            "fewer --num-workers need less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[dict[str, Encoded]], last: Document) -> Chunk:
    return Chunk(future.result(), last)


def _done(encoded: dict[str, Encoded]) -> Future[dict[str, Encoded]]:
    future: Future[dict[str, Encoded]] = Future()
    future.set_result(encoded)
    return future


_encoder: ChunkEncoder | None = None  # of a worker process


def _begin(tokenizer: Tokenizer, valid_fraction: float, seed: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads; it ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = ChunkEncoder(tokenizer, valid_fraction, seed)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(texts: Sequence[str]) -> dict[str, Encoded]:
    assert _encoder is not None
    return _encoder.encode(texts)
