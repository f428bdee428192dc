"""Which files of a folder are data, which describe the data, and which are held out.

A snapshot of a dataset from the Hub has, next to its data files, a README, a LICENSE and JSON that describe it, and test
splits that must not be trained on. In a folder of text alone a README is text like any other. So files that describe the data
are left out only of folders that hold records or a dataset card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain_xla.text.recognise import RECORDS, Kind

HELD_OUT = frozenset({"val", "valid", "validation", "test", "dev", "eval"})
TRAIN = frozenset({"train", "training"})
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|changelog|code_of_conduct|contributing)([._-].*)?"
    r"|(sha\d+|md5)sums?([._-].*)?|.*\.(sha\d+|md5)|checksums?([._-].*)?",
    re.IGNORECASE,
)
_CACHED = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")  # written by `map` of `datasets` next to the data
_BROKEN_OFF = re.compile(r".*(\.(incomplete|part|partial|crdownload|aria2|tmp)|~)", re.IGNORECASE)
_TEXT_SUFFIXES = ("", "txt", "text", "raw", "tokens")  # of plain text that comes in splits


@dataclass(frozen=True)
class TextFile:
    """A file that documents may be in."""

    path: str
    size: int
    kind: Kind | None
    """None means it is left out."""
    packing: str = ""
    """The suffix of its compression, if its name does not have it."""
    usual: Kind | None = None
    """The kind that its name implies; text for other names. `TextFiles` logs files whose `kind` differs."""
    why: str = ""
    """Why it is left out."""
    lacks_text: bool = False
    """See `Look`."""
    is_card: bool = False
    """See `Look`."""


def select(files: Sequence[TextFile], root: str) -> list[TextFile]:
    """The same files, those that are not data marked as left out, with the reason.

    Args:
        files: the files of a folder.
        root: the folder.
    """
    files = [
        _left_out(file, "half of a file or a copy, by its name" if is_broken_off(file.path) else "") for file in files
    ]
    about = _about_the_data(files)
    kept = [_left_out(file, about.get(file.path, "")) for file in files]
    if any(file.kind is not None and not file.lacks_text for file in kept):
        kept = [_left_out(file, "no such key or column in it" if file.lacks_text else "") for file in kept]
    held_out = _held_out(kept, root)
    return [_left_out(file, "held out, by its name" if file.path in held_out else "") for file in kept]


def is_about(path: str) -> bool:
    """Whether a file describes the data next to it, by its name."""
    return _ABOUT.fullmatch(path.rpartition("/")[2]) is not None


def is_broken_off(path: str) -> bool:
    """Whether a name is that of an incomplete download or of a program's backup copy."""
    return _BROKEN_OFF.fullmatch(path.rpartition("/")[2]) is not None


def _left_out(file: TextFile, why: str) -> TextFile:
    return replace(file, kind=None, why=why) if why and file.kind is not None else file


def _about_the_data(files: Sequence[TextFile]) -> dict[str, str]:
    """Path → why it is not data."""
    records = any(file.kind in RECORDS and not file.lacks_text for file in files)
    card = any(file.is_card for file in files)
    caches = {file.path for file in files if _CACHED.fullmatch(file.path.rpartition("/")[2])}
    found = dict.fromkeys(caches, "a cache of `datasets`") if len(caches) < len(files) else {}
    for file in files:
        if file.kind == "text" and (records or card) and is_about(file.path):
            found[file.path] = "about the data"
        elif file.kind == "text" and records and card:
            found[file.path] = "not records, in a dataset of the Hub"
    return found


def _held_out(files: Sequence[TextFile], root: str) -> set[str]:
    """The paths of validation and test splits that are next to training splits.

    Text files must be named alike: `train.py` and `test.py` are not splits, `wiki.train.raw` and `wiki.test.raw` are.
    """
    inside = {file.path: file.path.removeprefix(root) for file in files if file.kind is not None}
    train = [file for file in files if file.path in inside and _side(inside[file.path]) == "train"]
    records = any(file.kind in RECORDS for file in train)
    shapes = {_shape(inside[file.path]) for file in train}
    return {
        file.path
        for file in files
        if file.path in inside
        and _side(inside[file.path]) == "held out"
        and (
            (records and file.kind in RECORDS)
            or (_shape(inside[file.path]) in shapes and _suffix(file.path) in _TEXT_SUFFIXES)
        )
    }


def _side(path: str) -> str:
    words = set(re.split(r"[^a-z]+", path.lower()))
    if words & TRAIN:
        return "" if words & HELD_OUT else "train"
    return "held out" if words & HELD_OUT else ""


def _shape(path: str) -> str:
    """A path without the names of splits and the numbers of parts."""
    words = "|".join(sorted(HELD_OUT | TRAIN, key=len, reverse=True))
    return re.sub(r"\d+", "#", re.sub(rf"(?<![a-z])({words})(?![a-z])", "*", path.lower()))


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""
