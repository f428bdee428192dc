"""Files at any fsspec URL: finding them, and writing them atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted
from pretrain_xla.storage.retries import with_retries

_CREDENTIALS_OF_BUCKET = re.compile(r"(^|::)(s3a?|gs|gcs)://[^/@]*:[^@]*@")
PARTIAL = ".partial"  # suffix of a file while it is being written


VERSION_KEYS = (  # names that file systems give to a value that changes with a file's content
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "blob_id",
    "mtime",
    "updated",
    "LastModified",
    "last_modified",
    "Last-Modified",
)


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path on it (absolute where local, no slash at the end).

    Raises:
        UserError: the protocol is unknown or its package is not installed, or a bucket's URL holds credentials.
    """
    if _CREDENTIALS_OF_BUCKET.search(path):
        # Their libraries take the credentials for a part of the bucket's name, and show them when they do not find it.
        raise UserError(
            f"{redacted(path)}: a bucket's URL cannot hold credentials: put them into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (gs://: GOOGLE_APPLICATION_CREDENTIALS), or where its library looks for them"
        )
    try:
        fs, root = fsspec.core.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return fs, root.rstrip("/") or root


def is_local(fs: Any) -> bool:
    """Whether the file system is local."""
    return isinstance(fs, LocalFileSystem)


def url(fs: Any, path: str) -> str:
    """The path as a user would type it: with its protocol unless it is local."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def write_atomically(fs: Any, path: str, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file under a temporary name, then rename it; returns the SHA-256 of its bytes in hex.

    A missing folder is created. Locally, the data is flushed to the disk before the rename. In a bucket the rename is a copy
    within the bucket: the price of never leaving a part of a file when writing fails. There, transient errors are retried.

    Raises:
        UserError: the folder or the file cannot be written (no permission, disk full, ...); nothing is left behind.
    """
    make_folder(fs, path.rpartition("/")[0])
    try:
        if is_local(fs):
            return _write(fs, path, parts)
        kept = list(parts)
        return with_retries(url(fs, path), lambda: _write(fs, path, kept), "written")
    except BaseException as error:
        with contextlib.suppress(Exception):
            fs.rm_file(path + PARTIAL)
        if isinstance(error, UserError) or not isinstance(error, _faults(fs)):
            raise
        raise _not_written(fs, path, error) from None


def _write(fs: Any, path: str, parts: Iterable[bytes | memoryview]) -> str:
    partial, checksum = path + PARTIAL, hashlib.sha256()
    with fs.open(partial, "wb") as file:
        for part in parts:
            file.write(part)
            checksum.update(part)
        if is_local(fs):
            file.flush()
            os.fsync(file.fileno())
    fs.mv(partial, path)
    return checksum.hexdigest()


def missing_folders(folder: str) -> list[str]:
    """The missing ones of a local folder and those above it, innermost first."""
    above = [folder, *map(str, pathlib.PurePath(folder).parents)]
    return list(itertools.takewhile(lambda path: path != "" and not os.path.isdir(path), above))


def remove_empty(folders: Iterable[str]) -> None:
    """Remove the local folders that exist and are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or missing
            os.rmdir(folder)


def make_folder(fs: Any, path: str) -> None:
    """Create a missing folder and those above it; a bucket has no folders.

    Raises:
        UserError: it cannot be created.
    """
    try:
        fs.makedirs(path, exist_ok=True)
        if is_local(fs) and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except _faults(fs) as error:
        raise _not_written(fs, path, error) from None


def _faults(fs: Any) -> type[Exception]:
    """What file systems raise: the libraries for buckets and the web have their own errors."""
    return OSError if is_local(fs) else Exception


def _not_written(fs: Any, path: str, error: BaseException) -> UserError:
    if is_local(fs):
        reason, fix = getattr(error, "strerror", None) or error, "free some space or choose another folder"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
        reason, fix = text[:200], "check the credentials, the permissions and the network"
    return UserError(f"{url(fs, path)}: cannot be written: {reason}; {fix}")


def remove(fs: Any, paths: Iterable[str]) -> None:
    """Remove the files that exist.

    Raises:
        UserError: one cannot be removed.
    """
    for path in paths:
        try:
            if fs.exists(path):
                fs.rm_file(path)
        except _faults(fs) as error:
            raise UserError(
                f"{url(fs, path)}: cannot be removed: {getattr(error, 'strerror', None) or error}"
            ) from None
