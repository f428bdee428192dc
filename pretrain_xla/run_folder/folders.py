"""The folders of a run: tried before any device is touched, and gone again where a start is refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import missing_folders, remove_empty


def local_folders(config: RunConfig) -> dict[str, str]:
    """The key and path of each folder that the run writes to on a disk; a bucket is tried by its own client."""
    folders = {"run_dir": config.run_dir, "checkpoints_dir": config.checkpoints_dir}
    return {key: folder for key, folder in folders.items() if "://" not in folder}


@contextlib.contextmanager
def writable_folders(config: RunConfig) -> Iterator[None]:
    """Make the run's folders and write to each once; those that were made and are empty when a run fails are removed.

    Raises:
        UserError: a folder cannot be made or written.
    """
    made: list[str] = []
    try:
        for key, folder in local_folders(config).items():
            probe(key, folder, made)
        yield
    except BaseException:
        remove_empty(made)
        raise


def probe(key: str, folder: str, made: list[str]) -> None:
    """Make a folder where it is missing, and write to it once; `made` gets what was made, the innermost first.

    Raises:
        UserError: it cannot be made or written; the text names the key.
    """
    made[:0] = missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        # A file of its own for each process: they all try at the same time.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be written ({error.strerror}): name another folder") from None
