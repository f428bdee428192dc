"""What every process of a run must have alike, checked before it trains: settings, data, and the folder of checkpoints.

Without these checks two hosts with disks of their own would begin at different steps, and train on to wrong losses.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.folders import local_folders
from pretrain_xla.runtime import Hosts

MAY_DIFFER = frozenset(
    (
        "train_dir",
        "valid_dir",
        "eval_data",
        "checkpoints_dir",
        "run_dir",
        "from_checkpoint",
        "compile_cache",
        "tokenizer",
    )
)
"""Settings that name a path, which may be another one on each host. What is there is compared instead."""

APPEARS = 10.0
"""Seconds that a new file may take to be seen on another host, through the caches of a network disk."""

SHARE = "put it on a disk that all hosts share, or in a bucket (gs://…)"


def check_same_settings(config: RunConfig, hosts: Hosts) -> None:
    """Compare the settings of all processes.

    Raises:
        UserError: names the first setting that differs.
    """
    if hosts.count == 1:
        return
    trees = hosts.gather(config.model_dump(mode="json"), "the settings")
    settings = [dict(_leaves(tree)) for tree in trees]
    for index, other in enumerate(settings):
        for leaf, value in settings[0].items():
            if other.get(leaf) != value and leaf not in MAY_DIFFER:
                raise UserError(
                    f"{leaf}={value} in {hosts.name(0)}, and {leaf}={other.get(leaf)} in {hosts.name(index)}: start every "
                    "process with the same settings"
                )


def check_same_data(config: RunConfig, train: str, valid: str, hosts: Hosts) -> None:
    """Compare the data of all processes, given their fingerprints.

    Raises:
        UserError: one sees other shards.
    """
    own = [train, valid]
    for index, other in enumerate(hosts.gather(own, "the data")):
        if other != own:
            key = "train_dir" if other[0] != train else "valid_dir"
            raise UserError(
                f"{key}={getattr(config.data, key)} holds other shards in {hosts.name(index)} than in "
                f"{hosts.name(hosts.index)}: all must see the same data; {SHARE}, or copy it to every host"
            )


def check_shared(config: RunConfig, hosts: Hosts) -> None:
    """Check that all processes see the same folder of checkpoints: the first writes a file there, which the others look for.

    Raises:
        UserError: one does not see it.
    """
    folder = local_folders(config).get("checkpoints_dir")
    if folder is None or hosts.count == 1:
        return
    path = os.path.join(folder, hosts.first(f".shared_{secrets.token_hex(8)}", "the name of a file"))
    try:
        if hosts.is_first:
            with open(path, "xb"):
                pass
        hosts.barrier("a file in checkpoints_dir")
        sees = hosts.gather(_appears(path), "checkpoints_dir")
    finally:
        if hosts.is_first:
            with contextlib.suppress(OSError):
                os.unlink(path)
    if not all(sees):
        raise UserError(
            f"checkpoints_dir={folder} is not the same folder everywhere: {hosts.name(sees.index(False))} does not see what "
            f"{hosts.name(0)} writes there; {SHARE}"
        )


def _appears(path: str) -> bool:
    deadline = time.monotonic() + APPEARS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings of a config, whose names are unique in the tree."""
    return [leaf for section in tree.values() for leaf in section.items()]
