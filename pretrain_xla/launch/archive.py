"""The code that a run is made of, as one archive: what is committed, and on request what is not."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pretrain_xla
from pretrain_xla.errors import UserError


def repository() -> str:
    """The folder of the repository: the one we are in, if it has this package, else that of the package.

    Raises:
        UserError: the package is not in a repository.
    """
    for folder in (Path.cwd(), Path(pretrain_xla.__file__).resolve().parents[1]):
        if (folder / "pretrain_xla" / "cli.py").is_file() and (folder / "run_pretrain_xla.py").is_file():
            try:
                _git(str(folder), "rev-parse", "HEAD")
            except UserError:
                continue
            return str(folder)
    raise UserError(
        "launch sends the committed code to the workers, but this is not a git repository of pretrain_xla with a commit: "
        "git clone it, and launch from its folder"
    )


def commit(folder: str) -> str:
    """The present commit."""
    return _git(folder, "rev-parse", "HEAD").decode().strip()


def changes(folder: str) -> list[str]:
    """Files that differ from the commit, or are new and not ignored."""
    lines = _git(folder, "status", "--porcelain", "--untracked-files=all").decode("utf-8", "replace").splitlines()
    return [line[3:] for line in lines]


def pack(folder: str, uncommitted: bool) -> bytes:
    """The code as .tar.gz; the user's index and files stay as they are."""
    tree = _tree_of_files(folder) if uncommitted else "HEAD"
    return _git(folder, "archive", "--format=tar.gz", tree)


def holds(folder: str, path: str, uncommitted: bool) -> bool:
    """Whether a file, relative to the repository, is in the archive."""
    tree = _tree_of_files(folder) if uncommitted else "HEAD"
    return bool(_git(folder, "ls-tree", "--name-only", tree, "--", path).strip())


def _tree_of_files(folder: str) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        index = {"GIT_INDEX_FILE": os.path.join(temporary, "index")}
        _git(folder, "read-tree", "HEAD", extra=index)
        _git(folder, "add", "--all", extra=index)
        return _git(folder, "write-tree", extra=index).decode().strip()


def _git(folder: str, *words: str, extra: dict[str, str] | None = None) -> bytes:
    command: Sequence[str] = ("git", "-C", folder, *words)
    try:
        done = subprocess.run(command, capture_output=True, env={**os.environ, **(extra or {})}, check=False)
    except FileNotFoundError:
        raise UserError("git is not on PATH: launch packs the committed code with it") from None
    if done.returncode:
        raise UserError(f"git {words[0]} failed in {folder}: {done.stderr.decode('utf-8', 'replace').strip()[:300]}")
    return done.stdout
