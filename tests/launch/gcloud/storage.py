"""`gcloud storage`: a bucket's region, and small files. The objects of a bucket are files below the folder `buckets`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from . import texts
from .state import Record, State
from .syntax import Call


def bucket(state: State, call: Call, zone: str) -> Record:
    """`buckets describe`."""
    name = call.positionals[0].removeprefix("gs://").strip("/")
    if name not in state.data["buckets"]:
        raise texts.Failed(f"gs://{name} not found: 404.")
    location = state.data["buckets"][name]
    return {"location": location, "location_type": "region" if "-" in location else "multi-region", "name": name}


def cat(state: State, call: Call, zone: str) -> bytes:
    """`cat`."""
    path = _file(state, call.positionals[0])
    if not path.is_file():
        raise texts.Failed(f"The following URLs matched no objects or files:\n{call.positionals[0]}")
    return path.read_bytes()


def copy(state: State, call: Call, zone: str) -> None:
    """`cp` of one file; `-` is standard input."""
    source, target = (one if one == "-" else str(_file(state, one)) for one in call.positionals)
    content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_bytes(content)


def synchronize(state: State, call: Call, zone: str) -> None:
    """`rsync` of a folder."""
    source, target = (_file(state, one) for one in call.positionals)
    if not source.is_dir():
        raise texts.Failed(f"Did not find existing container at: {call.positionals[0]}")
    shutil.copytree(source, target, dirs_exist_ok=True)


def _file(state: State, name: str) -> Path:
    if not name.startswith("gs://"):
        return Path(name)
    owner, _, path = name.removeprefix("gs://").partition("/")
    if owner not in state.data["buckets"]:
        raise texts.Failed(f"gs://{owner} not found: 404.")
    return state.folder / "buckets" / owner / path
