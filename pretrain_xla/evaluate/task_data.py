"""Reading a task's items: JSON lines at any path, glob or fsspec URL, or a dataset of the Hugging Face Hub."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import filesystem, url
from pretrain_xla.storage.find import fitting, path_type
from pretrain_xla.text.open_file import LONGEST_DOCUMENT, UNPACK_ERRORS, lines_of, open_file, unpacked
from pretrain_xla.untrusted import parse_json

Fields = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One item of a file. where: file and line, for messages."""

    fields: Fields
    where: str


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, the default source of a task's items."""

    path: str
    name: str | None
    split: str

    def __str__(self) -> str:
        return ":".join(filter(None, (self.path, self.name, self.split)))


def find_file(folder: str, stem: str, split: str) -> str:
    """Find the file of a task in a folder of evaluation data by the start of its name.

    Args:
        folder: local path or fsspec URL.
        stem: start of the name; case is ignored, and `-` is the same as `_`.
        split: part of the name that decides if several files start with `stem`.

    Raises:
        UserError: no such folder, no such file, or several.
    """
    fs, root = filesystem(folder)
    if not fs.isdir(root):
        raise UserError(f"{folder}: no such folder of evaluation data")
    names = {path: path.rpartition("/")[2].lower().replace("-", "_") for path in sorted(fs.ls(root, detail=False))}
    found = [path for path, name in names.items() if name.startswith(stem) and not name.endswith(".lst")]
    if len(found) > 1:
        found = [path for path in found if split in names[path].removeprefix(stem)] or found
    if len(found) != 1:
        what = f"several files begin with {stem}" if found else f"no file begins with {stem}"
        raise UserError(f"{folder}: {what}: name one, as TASK=FILE")
    return url(fs, found[0])


def read_records(source: str) -> Iterator[Record]:
    """The objects of a `.jsonl` file, compressed or not, or of all files that match a glob, in the order of their names.

    Labels in a separate file (`dev-labels.lst` for `dev.jsonl`, one line for each item) are added to their items as `label`.

    Raises:
        UserError: no such file, or not JSON lines.
    """
    for path, lines in _open_all(source):
        labels = _labels(path)
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            fields = parse_json(line, where)
            if not isinstance(fields, dict):
                raise UserError(f"{where}: not a JSON object, but {type(fields).__name__}")
            if labels is not None:
                if number > len(labels):
                    raise UserError(f"{where}: its file of labels has only {len(labels)} lines")
                fields.setdefault("label", labels[number - 1])
            yield Record(fields, where)


def read_lines(source: str) -> Iterator[str]:
    """The lines of a text file, or of all that match a glob, with their line ends.

    Raises:
        UserError: no such file, or not text.
    """
    length = 0
    for path, lines in _open_all(source):
        for line in lines:
            length += len(line)
            if length > LONGEST_DOCUMENT:
                raise UserError(f"{path}: more than {LONGEST_DOCUMENT:,} characters to score: take a part of it")
            yield line


def read_hub(dataset: HubDataset, task: str) -> Iterator[Record]:
    """The rows of a dataset of the Hub, or of its copy in the cache.

    Raises:
        UserError: it cannot be loaded; the message says how to name a file instead.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset.path, dataset.name, split=dataset.split)
    except Exception as error:  # `datasets` passes on any exception of its network clients
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"task {task}: {dataset.path} cannot be loaded from the Hugging Face Hub ({reason}); "
            f"with no network, name a file: {task}=FILE in the tasks, or a folder of them with --data-dir"
        ) from None
    for number, fields in enumerate(rows):
        yield Record(dict(fields), f"{dataset}[{number}]")


def _open_all(source: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(path, lines) of each file that a path, glob or URL matches."""
    fs, root = filesystem(source)
    fits = fitting(fs, root, source) if glob.has_magic(root) and path_type(fs, root) != "file" else [root]
    paths = sorted(path for path in fits if path_type(fs, path) == "file")
    if not paths:
        raise UserError(f"{source}: no such file")
    for path in paths:
        yield url(fs, path), _lines(fs, path)


def _lines(fs: Any, path: str) -> Iterator[str]:
    try:
        with (
            open_file(fs, path) as raw,
            io.TextIOWrapper(unpacked(raw, path), encoding="utf-8-sig", newline="\n") as stream,
        ):
            yield from lines_of(stream, url(fs, path))
    except UnicodeDecodeError:
        raise UserError(f"{url(fs, path)}: not UTF-8 text") from None
    except (OSError, *UNPACK_ERRORS) as error:
        raise UserError(f"{url(fs, path)}: cannot be read: {error}") from None


def _labels(path: str) -> list[str] | None:
    fs, root = filesystem(path)
    labels_file = f"{root.removesuffix('.gz').removesuffix('.jsonl')}-labels.lst"
    if not fs.isfile(labels_file):
        return None
    return [line.strip() for line in _lines(fs, labels_file)]
