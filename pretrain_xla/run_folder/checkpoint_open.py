"""Finding the checkpoint that a user's path means, and the weights in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from pretrain_xla.errors import UserError
from pretrain_xla.optim.averaging import AVERAGE
from pretrain_xla.run_folder.checkpoint import CheckpointStore, DamagedCheckpoint
from pretrain_xla.run_folder.checkpoint_folders import step_of


def open_checkpoint(
    path: str, which: str = "newest", say: Callable[[str], None] = lambda line: None
) -> tuple[CheckpointStore, int]:
    """Find the checkpoint of a path: store and step.

    Args:
        path: a run folder, a folder of checkpoints, or one checkpoint.
        which: `newest` or `best`, if there are several.
        say: called with a line for each damaged checkpoint that is skipped, and if no validation loss was measured for `best`.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = path.rstrip("/")
    if (step := step_of(os.path.basename(path))) is not None:
        store = CheckpointStore(os.path.dirname(path) or ".", limit=1)
        if step in store.steps():
            return store, step
        if step in store.damaged:
            raise DamagedCheckpoint(store.damaged[step], "remove that folder")
    damaged: list[str] = []
    for root in (path, f"{path}/checkpoints"):
        store = CheckpointStore(root, limit=1)
        found = store.newest()
        lines = store.skipped(found)
        if found is None:
            damaged += lines
            continue
        if which == "best" and (best := store.best()) is not None:
            found = best
        elif which == "best":
            lines.append(f"{root}: no checkpoint has a measured validation loss: using the newest, of step {found}")
        for line in lines:
            say(line)
        return store, found
    if damaged:
        raise UserError(f"{damaged[-1]}, and there is no other: remove that folder")
    raise UserError(f"{path}: no complete checkpoint there; name a run folder, its checkpoints folder, or one step_…")


def weights_prefix(names: Iterable[str]) -> str:
    """What the names of the weights to use begin with, among those of a checkpoint's tensors: the averaged ones, where it has
    them. Training continues with `model.` always."""
    averaged = f"optimizer.{AVERAGE}"
    return averaged if any(name.startswith(averaged) for name in names) else "model."
