"""The folder of a run that outlives its slices: what `--bucket` names.

A `gs://` folder is read and written through gcloud, as the user is logged in there; any other URL, or a folder that this
machine and all workers mount, through fsspec. It holds `launch.json` (the state), `code.tar.gz`, `checkpoints/`, with the run's
metrics and other records in `checkpoints/records/`, and `logs/`.
"""

from __future__ import annotations

import os
import tempfile
from typing import Protocol

from pretrain_xla.errors import UserError
from pretrain_xla.launch.calls import Calls
from pretrain_xla.launch.gcloud import Gcloud, GcloudError, Kind
from pretrain_xla.storage.files import filesystem, write_atomically


class Bucket(Protocol):
    """Files by name below one URL."""

    url: str

    def read(self, name: str) -> bytes | None:
        """The content of a small file. None means that it is not there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file: whole, or not at all."""

    def download(self, name: str, folder: str) -> None:
        """Copy a folder to a local one; a missing folder is empty."""


class GoogleBucket:
    """A folder at `gs://`."""

    def __init__(self, url: str, gcloud: Gcloud, calls: Calls) -> None:
        self.url, self._gcloud, self._calls = url.rstrip("/"), gcloud, calls

    def read(self, name: str) -> bytes | None:
        """See `Bucket`."""
        try:
            return self._gcloud.patiently(self._calls.read(f"{self.url}/{name}"))
        except GcloudError as error:
            if error.kind is Kind.NOT_FOUND:
                return None
            raise self._refused("read", name, error) from None

    def write(self, name: str, content: bytes) -> None:
        """See `Bucket`."""
        try:
            self._gcloud.patiently(self._calls.write(f"{self.url}/{name}"), content)
        except GcloudError as error:
            raise self._refused("written", name, error) from None

    def download(self, name: str, folder: str) -> None:
        """See `Bucket`."""
        os.makedirs(folder, exist_ok=True)
        try:
            self._gcloud.patiently(self._calls.download(f"{self.url}/{name}", folder), seconds=3600.0)
        except GcloudError as error:
            if error.kind is not Kind.NOT_FOUND:
                raise self._refused("read", name, error) from None

    def _refused(self, what: str, name: str, error: GcloudError) -> UserError:
        return UserError(f"{self.url}/{name} cannot be {what}: {error.text}")


class OtherBucket:
    """A folder at any other URL that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = filesystem(self.url)

    def read(self, name: str) -> bytes | None:
        """See `Bucket`."""
        try:
            content: bytes = self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.url}/{name} cannot be read: {error}") from None
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `Bucket`."""
        write_atomically(self._fs, f"{self._root}/{name}", [content])

    def download(self, name: str, folder: str) -> None:
        """See `Bucket`."""
        os.makedirs(folder, exist_ok=True)
        if self._fs.isdir(f"{self._root}/{name}"):
            self._fs.get(f"{self._root}/{name}/", f"{folder}/", recursive=True)


def open_bucket(url: str, gcloud: Gcloud, calls: Calls) -> Bucket:
    """The folder at a URL."""
    return GoogleBucket(url, gcloud, calls) if url.startswith("gs://") else OtherBucket(url)


def write_file(path: str, content: bytes) -> None:
    """Replace a local file atomically, readable by its owner alone."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
