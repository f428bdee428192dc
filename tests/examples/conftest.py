"""The local tree as a repository that can be cloned, and what a small run needs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ..end_to_end.conftest import ROOT, flags, tokens

__all__ = ["flags", "tokens"]

PARTS = ("pretrain_xla", "configs", "examples", "scripts", "README.md", "pyproject.toml", "*.py", "requirements*.txt")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit: the local tree as it is, also what is not committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for part in PARTS:
        for path in ROOT.glob(part):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "the local tree"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder
