"""What a run keeps beside its metrics so that it can be read on its own: its config and its tokenizer."""

from __future__ import annotations

import fnmatch
import os

from pretrain_xla.config import DataConfig, RunConfig
from pretrain_xla.config_file import to_yaml
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.metrics import metrics_path, read_metrics, rewrite
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer, stored_tokenizer
from pretrain_xla.tokenizers.tokenizer import is_stored

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
# What a run records, by patterns: it cannot be had again without training again.
RECORDS = ("metrics.jsonl", "samples.txt", "summary.json", "loss.png", "events.out.tfevents.*", CONFIG_FILE)


def set_aside(run_dir: str) -> str | None:
    """Move what an earlier run recorded in this folder into a folder of its own, for a run that begins anew here.

    Its checkpoints were removed, or are elsewhere, or it died before the first; nobody but a person can say whether its curve
    is still wanted. Validation before the first step alone is no record.

    Returns:
        The folder `earlier_1` …, which TensorBoard shows as a run of its own. None means there was nothing.
    """
    path = metrics_path(run_dir)
    if not os.path.exists(path) or not any(row["step"] > 0 for row in read_metrics(path)):
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
    """Write `config.yaml`, and a copy of the data's tokenizer where that is a file (names need none)."""
    rewrite(os.path.join(config.run_dir, CONFIG_FILE), [to_yaml(config)])
    info = dataset_info(config.data.train_dir)
    name = config.data.tokenizer or (info.tokenizer_name if info else None)
    if name and name not in known_tokenizers():
        tokenizer = load_tokenizer(name)
        if is_stored(tokenizer):
            tokenizer.save(os.path.join(config.run_dir, TOKENIZER_FOLDER))


def tokenizer_of(data: DataConfig) -> str:
    """Name of the tokenizer that a run's shards were made with: as configured, as the manifest beside them says, or gpt2."""
    info = None if data.tokenizer else dataset_info(data.train_dir)
    return data.tokenizer or (info.tokenizer_name if info else "gpt2")


def find_tokenizer(checkpoints_dir: str) -> str | None:
    """The copy that a run keeps, from its checkpoints folder: in it, or in the run folder above."""
    found = (
        stored_tokenizer(f"{folder}/{TOKENIZER_FOLDER}")
        for folder in (checkpoints_dir, os.path.dirname(checkpoints_dir))
    )
    return next(filter(None, found), None)
