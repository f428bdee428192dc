"""Copies of a run's records beside its checkpoints, where these are in a bucket: a lost machine takes its own disk along.

Each checkpoint is completed only after the records up to its step have been copied to `records/` in `checkpoints_dir`. So a run
that goes on from it on another machine fetches them first, and its metrics have no gap. That they cannot be copied or fetched
ends nothing: there is a warning, and the run continues.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.files import RECORDS, TOKENIZER_FOLDER
from pretrain_xla.run_folder.metrics import metrics_path, read_metrics
from pretrain_xla.storage.files import filesystem, write_atomically
from pretrain_xla.storage.remote import call
from pretrain_xla.system_faults import reason

FOLDER = "records"
_PLAIN = re.compile(rf"({TOKENIZER_FOLDER}/)?[A-Za-z0-9_][\w.-]*")
"""A file's name comes from the bucket: it must not lead out of the run's folder."""


class RecordsCopy:
    """The records of a run folder, and their copies.

    Args:
        run_dir: local folder of the records.
        checkpoints_dir: URL of the checkpoints.
        warn: called with a line if something cannot be copied.

    Raises:
        UserError: a URL with an unknown scheme.
    """

    def __init__(self, run_dir: str, checkpoints_dir: str, warn: Callable[[str], None]) -> None:
        self._run_dir, self._warn = run_dir, warn
        self.url = f"{checkpoints_dir.rstrip('/')}/{FOLDER}"
        self._files, self._root = filesystem(self.url)
        self._sent: dict[str, tuple[int, int]] = {}

    def send(self) -> None:
        """Copy the records that changed since they were copied last."""
        for name in self._local():
            path = os.path.join(self._run_dir, name)
            try:
                found = os.stat(path)
                if self._sent.get(name) == (known := (found.st_size, found.st_mtime_ns)):
                    continue
                with open(path, "rb") as file:
                    write_atomically(self._files, f"{self._root}/{name}", [file.read()])
                self._sent[name] = known
            except (OSError, UserError) as error:
                self._warn(f"{path} could not be copied to {self.url} ({reason(error)}): the run continues")
                return

    def fetch(self, step: int) -> None:
        """Before a run goes on after `step`: fetch the records that this machine does not have; at step 0 there are none."""
        if not step:
            return
        try:
            names = [name for name in self._remote() if not os.path.exists(os.path.join(self._run_dir, name))]
            if "metrics.jsonl" not in names and self._lacks_rows(step):
                names += [name for name in ("metrics.jsonl", "samples.txt") if name in self._remote()]
            for name in names:
                self._fetch_one(name)
        except (OSError, UserError) as error:
            self._warn(
                f"the records in {self.url} could not be fetched ({reason(error)}): the run continues without them"
            )

    def _fetch_one(self, name: str) -> None:
        path = os.path.join(self._run_dir, name)
        content: bytes = call(self._files, "cat_file", f"{self._root}/{name}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)

    def _lacks_rows(self, step: int) -> bool:
        """Whether the metrics here end before a step that a checkpoint has."""
        path = metrics_path(self._run_dir)
        return not os.path.exists(path) or max((row["step"] for row in read_metrics(path)), default=0) < step

    def _local(self) -> list[str]:
        tokenizer = os.path.join(self._run_dir, TOKENIZER_FOLDER)
        inside = [f"{TOKENIZER_FOLDER}/{name}" for name in os.listdir(tokenizer)] if os.path.isdir(tokenizer) else []
        return [name for name in [*sorted(os.listdir(self._run_dir)), *sorted(inside)] if _is_record(name)]

    def _remote(self) -> list[str]:
        try:
            found = call(self._files, "find", self._root)
        except FileNotFoundError:
            return []
        names = [str(path).removeprefix(self._root).lstrip("/") for path in found]
        return [name for name in names if _PLAIN.fullmatch(name) and _is_record(name)]


def _is_record(name: str) -> bool:
    return name.startswith(f"{TOKENIZER_FOLDER}/") or any(fnmatch.fnmatchcase(name, pattern) for pattern in RECORDS)


def records_copy(config: RunConfig, warn: Callable[[str], None]) -> RecordsCopy | None:
    """The copies of a run's records. None where its checkpoints are on the local disk, too."""
    if "://" not in config.checkpoints_dir:
        return None
    return RecordsCopy(config.run_dir, config.checkpoints_dir, warn)
