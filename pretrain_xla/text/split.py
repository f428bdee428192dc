"""Which split a piece of text belongs to: decided by a hash of the text alone.

The order of documents and the other documents do not matter: if text is added to a corpus, what was held out stays held out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

LONG_DOCUMENT = 100_000  # characters: about the longest web page, so only books and whole corpora in one file are cut
PIECE = 10_000


def split_document(document: str, valid_fraction: float, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(split, text) of a document: all of it in `train` or in `valid`.

    A document of more than `LONG_DOCUMENT` characters is cut at blank lines into pieces of about `PIECE`, and each gets its
    own split; neighbours in the same split stay one text. So a corpus that is one big file has a validation split, too.

    Args:
        document: the text.
        valid_fraction: fraction of the documents that goes to `valid`.
        seed: another seed holds out other documents.
    """
    pieces = _pieces(document) if len(document) > LONG_DOCUMENT else [document]
    for split, texts in itertools.groupby(pieces, key=lambda piece: _split_of(piece, valid_fraction, seed)):
        yield split, "".join(texts)


def _split_of(text: str, valid_fraction: float, seed: int) -> str:
    salt = seed.to_bytes(hashlib.blake2b.SALT_SIZE, "big")
    place = (
        int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8, salt=salt).digest(), "big") / 2**64
    )
    return "valid" if place < valid_fraction else "train"


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while True:
        cuts = (document.find(blank, start + PIECE, start + 2 * PIECE) for blank in ("\n\n", "\r\n\r\n"))
        cut = min((cut for cut in cuts if cut >= 0), default=-1)
        if cut < 0:
            cut = document.find("\n", start + PIECE)
        if cut < 0:
            break
        while cut < len(document) and document[cut] in "\r\n":
            cut += 1
        yield document[start:cut]
        start = cut
    if start < len(document):
        yield document[start:]
