"""Documents → token arrays on all cores, in the order of the documents.

One process reads; the others split and encode. Chunks of about a million characters are sent to them, and come back as arrays
of ids. A few chunks are in flight for each worker, so that none idles while the reader keeps up. Results are used in the order
in which the chunks were sent, so that they do not depend on the number of workers.
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
_CHUNKS_BEFORE_WORKERS = 4  # encoded here before any process is started, which is enough for a small corpus
_CHUNKS_PER_WORKER = 3  # in flight


@dataclass(frozen=True)
class Encoded:
    """The tokens of one split in a chunk."""

    tokens: np.ndarray
    """Ids, with end-of-text after each document, in the type that shards of this vocabulary have."""
    documents: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, encoded."""

    splits: dict[str, Encoded]
    last: Document
    """The last document; its `place` is where to resume after this chunk."""


class ChunkEncoder:
    """Texts → tokens of each split, as each worker computes it."""

    def __init__(self, tokenizer: Tokenizer, valid_fraction: float, seed: int) -> None:
        self._encode = document_encoder(tokenizer)
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._valid_fraction, self._seed = valid_fraction, seed

    def encode(self, texts: Sequence[str]) -> dict[str, Encoded]:
        """Divide documents between the splits, and encode them."""
        parts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in texts:
            for split, part in split_document(text, self._valid_fraction, self._seed):
                parts[split].append(part)
        return {split: Encoded(self._encode(part).astype(self._dtype), len(part)) for split, part in parts.items()}


def encode_chunks(
    documents: Iterable[Document], tokenizer: Tokenizer, valid_fraction: float, seed: int, num_workers: int
) -> Generator[Chunk, None, None]:
    """Encode documents on several cores; closing the generator ends the processes.

    Args:
        documents: the tokens are in the order of these.
        tokenizer: sent to the workers by pickling.
        valid_fraction: see `split_document`.
        seed: see `split_document`.
        num_workers: processes that encode; 1 means this process alone.

    Raises:
        UserError: a worker was killed, or `documents` raises it.
    """
    chunks = _chunks(documents)
    encoder = ChunkEncoder(tokenizer, valid_fraction, seed)
    for chunk in chunks if num_workers == 1 else itertools.islice(chunks, _CHUNKS_BEFORE_WORKERS):
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
    # Not forked from this process: it may have threads, and locks that they hold would stay locked in the fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, arguments)
    in_flight: collections.deque[tuple[Future[dict[str, Encoded]], Document]] = collections.deque()
    workers_ready = False
    try:
        for chunk in chunks:
            texts, last = [document.text for document in chunk], chunk[-1]
            workers_ready = workers_ready or (len(in_flight) >= num_workers and in_flight[0][0].done())
            if workers_ready or len(in_flight) < num_workers:
                in_flight.append((pool.submit(_encode, texts), last))
            else:  # starting the processes takes about a second
                in_flight.append((_done(encoder.encode(texts)), last))
            while len(in_flight) >= _CHUNKS_PER_WORKER * num_workers:
                yield _result(*in_flight.popleft())
        while in_flight:
            yield _result(*in_flight.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (most often for lack of memory): give the same command again to resume; "
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


_encoder: ChunkEncoder | None = None  # in a worker process


def _start_worker(tokenizer: Tokenizer, valid_fraction: float, seed: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the reading process, which ends the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = ChunkEncoder(tokenizer, valid_fraction, seed)


def _exit_with_parent() -> None:
    """End this worker when its parent is killed, which then cannot do it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(texts: Sequence[str]) -> dict[str, Encoded]:
    assert _encoder is not None
    return _encoder.encode(texts)
