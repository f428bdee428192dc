"""The Hugging Face Hub: fetching models, and pushing checkpoints and exports.

Everything goes through `huggingface_hub`, with the login that `hf auth login` keeps or `HF_TOKEN` holds, and its cache.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.checkpoint import MARKER, PREFIX, CheckpointStore

P = ParamSpec("P")
R = TypeVar("R")

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINTS = "checkpoints"  # folder in a repository, as in a run folder
RUN_FILES = ("config.yaml", "tokenizer/*")
# Errors of the Hub's client and of its HTTP library. That library varies, so its classes are taken from their bases.
FAULTS: tuple[type[Exception], ...] = (HFValidationError, *HfHubHTTPError.__bases__)
LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that may write to it"


def is_name(text: str) -> bool:
    """Whether this is `owner/name`."""
    return NAME.fullmatch(text) is not None


def reports_user_errors(function: Callable[Concatenate[str, P], R]) -> Callable[Concatenate[str, P], R]:
    """Turn the Hub's and the network's errors into a `UserError` of one line; the first argument is the repository."""

    @functools.wraps(function)
    def call(repository: str, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(repository, *arguments, **keywords)
        except FAULTS as error:
            raise UserError(f"{repository} on the Hugging Face Hub: {_reason(error)}") from None

    return call


@reports_user_errors
def find(repository: str, name: str) -> str | None:
    """Fetch one file of a repository into the cache and return its path; None means that the repository has no such file.

    Without a network, only the cache is read.

    Raises:
        UserError: the repository does not exist or may not be read, or it is not in the cache and there is no network.
    """
    try:
        return str(huggingface_hub.hf_hub_download(repository, name))
    except LocalEntryNotFoundError:
        if isinstance(huggingface_hub.try_to_load_from_cache(repository, "config.json"), str):
            return None  # the repository is in the cache, and it was fetched without this file
        raise
    except EntryNotFoundError:
        return None


@reports_user_errors
def download_checkpoint(repository: str, which: str = "newest") -> str:
    """Fetch one checkpoint of a run that was pushed to the Hub, with the run's tokenizer; returns its folder in the cache.

    Raises:
        UserError: there is none, or the repository cannot be read.
    """
    found = steps(repository)
    if not found:
        raise UserError(f"{repository} on the Hugging Face Hub: neither a config.json there nor a complete checkpoint")
    markers = _markers(repository, found)
    newest = markers.newest()
    best = markers.best() if which == "best" else None
    if newest is None:  # all are damaged, which opening one reports
        newest = found[-1]
    folder = f"{CHECKPOINTS}/{folder_name(newest if best is None else best)}"
    root = huggingface_hub.snapshot_download(repository, allow_patterns=[*RUN_FILES, f"{folder}/*"])
    return f"{root}/{folder}"


@reports_user_errors
def steps(repository: str) -> list[int]:
    """Steps of the complete checkpoints in a repository, ascending; empty where there is no such repository.

    Raises:
        UserError: the Hub cannot be reached.
    """
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository)
    except RepositoryNotFoundError:
        return []
    marked = re.compile(rf"{CHECKPOINTS}/{PREFIX}(\d+)/{re.escape(MARKER)}")
    return sorted(int(match[1]) for file in files if (match := marked.fullmatch(file)))


def _markers(repository: str, found: Sequence[int]) -> CheckpointStore:
    """The checkpoints of these steps with only their markers downloaded, which hold their losses."""
    patterns = [f"{CHECKPOINTS}/{folder_name(step)}/{MARKER}" for step in found]
    root = huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    return CheckpointStore(f"{root}/{CHECKPOINTS}", limit=1)


@reports_user_errors
def check_writable(repository: str) -> None:
    """Check before training that we are logged in and may write; a missing repository is created, private.

    Raises:
        UserError: not logged in, no permission, no such owner, or no network.
    """
    if not is_name(repository):
        raise UserError(f"{repository!r} is not a repository of the Hugging Face Hub: name it owner/name")
    api = huggingface_hub.HfApi()
    api.whoami()
    api.create_repo(repository, private=True, exist_ok=True)
    api.auth_check(repository, write=True)


@reports_user_errors
def push_folder(repository: str, folder: str, message: str) -> str:
    """Upload a folder in one commit; returns the address of the repository.

    Raises:
        UserError: it could not be uploaded.
    """
    huggingface_hub.HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


@reports_user_errors
def push_checkpoint(repository: str, store: CheckpointStore, step: int, files: Mapping[str, str]) -> None:
    """Upload one checkpoint and the run's small files in one commit, which also removes those that the run no longer keeps.

    The store's retention rule applies to local and pushed checkpoints together: after a move to another host, only the Hub has
    the earlier ones. A commit is atomic, so that nobody ever finds half a checkpoint.

    Args:
        repository: `owner/name`.
        store: the run's checkpoints, in a local folder.
        step: the checkpoint to upload.
        files: the run's small files: name in the repository → local path.

    Raises:
        UserError: it could not be uploaded.
    """
    operations: list[huggingface_hub.CommitOperationAdd | huggingface_hub.CommitOperationDelete] = []
    for root, _, names in os.walk(store.folder(step)):
        for file in names:
            path = os.path.join(root, file)
            inside = f"{CHECKPOINTS}/{os.path.relpath(path, store.root)}"
            operations.append(huggingface_hub.CommitOperationAdd(inside, path))
    operations += [huggingface_hub.CommitOperationAdd(inside, path) for inside, path in files.items()]
    there = steps(repository)
    losses = _markers(repository, there).losses() if there else {}
    for old in set(losses) - store.kept(losses) - {step}:  # damaged ones are left alone
        inside = f"{CHECKPOINTS}/{folder_name(old)}/"
        operations.append(huggingface_hub.CommitOperationDelete(inside, is_folder=True))
    huggingface_hub.HfApi().create_commit(repository, operations, commit_message=f"Checkpoint of step {step}")


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def _reason(error: BaseException) -> str:
    """The cause and its fix, in one line."""
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in: {LOG_IN}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses ({status}: no such repository, or not yours): {LOG_IN}"
    words = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, LocalEntryNotFoundError):
        words = (
            "it cannot be downloaded, and is not in the cache; with no network, put it into the Hub's cache beforehand "
        )
        return f"{words}({huggingface_hub.constants.HF_HUB_CACHE})"
    return f"{words}; look at the network and the name"
