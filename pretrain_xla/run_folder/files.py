"""The config and the tokenizer in a run's folder, which make the folder self-contained, and earlier runs' records there."""

from __future__ import annotations

import fnmatch
import os

from pretrain_xla.config import DataConfig, RunConfig
from pretrain_xla.config_file import to_yaml
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.goodput import STARTS_FILE
from pretrain_xla.run_folder.metrics import metrics_path, read_rows, rewrite
from pretrain_xla.run_folder.trackers import WANDB_ID_FILE
from pretrain_xla.tokenizers.checksums import recording_checksums
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer, stored_tokenizer
from pretrain_xla.tokenizers.tokenizer import is_stored

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
# Patterns of the files that a run records: only training again would give them back.
RECORDS = (
    "metrics.jsonl",
    STARTS_FILE,
    "samples.txt",
    "summary.json",
    "loss.png",
    "events.out.tfevents.*",
    WANDB_ID_FILE,
    CONFIG_FILE,
)


def set_aside(run_dir: str) -> str | None:
    """Move the records of an earlier run in this folder into a subfolder, before a new run starts here.

    The earlier run's checkpoints were removed, are elsewhere, or were never written; only the user knows whether its curve is
    still of use. A validation before the first step alone does not count as a record.

    Returns:
        The subfolder (`earlier_1` …), which TensorBoard shows as a separate run, or None if there was nothing to move.
    """
    path = metrics_path(run_dir)
    rows, damaged = read_rows(path) if os.path.exists(path) else ([], [])
    if not damaged and not any(row["step"] > 0 for row in rows):
        return None
    number = 1
    while os.path.exists(aside := os.path.join(run_dir, f"earlier_{number}")):
        number += 1
    try:
        os.mkdir(aside)
        for name in sorted(os.listdir(run_dir)):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in RECORDS):
                os.rename(os.path.join(run_dir, name), os.path.join(aside, name))
    except OSError as error:
        raise UserError(f"{aside} cannot be made ({error.strerror}): make room, or name another --run-dir") from None
    return aside


def write_run_files(config: RunConfig) -> None:
    """Write `config.yaml`, and a copy of the data's tokenizer if it is a file and not a known name."""
    rewrite(os.path.join(config.run_dir, CONFIG_FILE), [to_yaml(config)])
    info = dataset_info(config.data.train_dir)
    name = config.data.tokenizer or (info.tokenizer_name if info else None)
    if name and name not in known_tokenizers():
        tokenizer = load_tokenizer(name)
        if is_stored(tokenizer):
            folder = os.path.join(config.run_dir, TOKENIZER_FOLDER)
            with recording_checksums(folder):
                tokenizer.save(folder)


def tokenizer_of(data: DataConfig) -> str:
    """The tokenizer of a run's shards: as configured, as their manifest says, or gpt2."""
    info = None if data.tokenizer else dataset_info(data.train_dir)
    return data.tokenizer or (info.tokenizer_name if info else "gpt2")


def find_tokenizer(checkpoints_dir: str) -> str | None:
    """The run's copy of its tokenizer, in the checkpoints folder or in its parent, or None."""
    found = (
        stored_tokenizer(f"{folder}/{TOKENIZER_FOLDER}")
        for folder in (checkpoints_dir, os.path.dirname(checkpoints_dir))
    )
    return next(filter(None, found), None)
