"""How documents are read from files, and what happens to one that cannot be read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from pretrain_xla.errors import UserError

logger = logging.getLogger(__name__)
_SHOWN = 3


@dataclass(frozen=True)
class Reading:
    """The user's options for reading files."""

    column: str = "text"
    """Key or column that holds the text, in files of records; `a.b` is the key `b` of the value of `a`."""
    one_per_line: bool = False
    """Whether each line of a text file is a document."""
    skips_bad: bool = False
    """Whether to go on after a document that cannot be read."""

    @property
    def decoding(self) -> str:
        """The error handler for bytes that are not UTF-8: raise, or turn them into surrogates (see `is_utf8`)."""
        return "surrogateescape" if self.skips_bad else "strict"


class Bad(NamedTuple):
    """Takes the place of a document that cannot be read."""

    reason: str
    """Where it is, and why it cannot be read."""


class BadDocuments:
    """Raises at the first document that cannot be read, or counts those that are skipped."""

    def __init__(self, skips: bool) -> None:
        self._skips = skips
        self.count = 0

    def meet(self, bad: Bad) -> None:
        """Handle one.

        Raises:
            UserError: bad documents are not skipped.
        """
        if not self._skips:
            raise UserError(bad.reason)
        self.count += 1
        if self.count <= _SHOWN:
            logger.warning("skipped: %s%s", bad.reason, " (more are not shown)" if self.count == _SHOWN else "")


def is_utf8(text: str) -> bool:
    """Whether text that was decoded by `Reading.decoding` was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
