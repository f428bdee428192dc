"""The folders of a run: created and tested before any device is touched, and removed again if the run is refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.storage.files import missing_folders, remove_empty


def local_folders(config: RunConfig) -> dict[str, str]:
    """Setting → path of each local folder that the run writes to; buckets are checked by their own client."""
    folders = {"run_dir": config.run_dir, "checkpoints_dir": config.checkpoints_dir}
    return {key: folder for key, folder in folders.items() if "://" not in folder}


@contextlib.contextmanager
def writable_folders(config: RunConfig) -> Iterator[None]:
    """Create the run's folders and write to each once; folders that were created and are still empty when the run fails are
    removed.

    Raises:
        UserError: a folder cannot be created or written.
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
    """Create a folder if it is missing, and write to it once; created folders are added to `made`, innermost first.

    Raises:
        UserError: it cannot be created or written; the text names the setting `key`.
    """
    made[:0] = missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        # One file for each process: all of them test at the same time.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be written ({error.strerror}): name another folder") from None
