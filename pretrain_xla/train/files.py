"""What a run keeps beside its metrics so that it can be read on its own: its config and its tokenizer."""

from __future__ import annotations

import os

from pretrain_xla.config import RunConfig
from pretrain_xla.config_file import to_yaml
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.data.tokenizer import StoredTokenizer, known_tokenizers, load_tokenizer, stored_tokenizer

TOKENIZER_FOLDER = "tokenizer"


def write_run_files(config: RunConfig) -> None:
    """Write `config.yaml`, and a copy of the data's tokenizer where that is a file (names need none)."""
    with open(os.path.join(config.run_dir, "config.yaml"), "w", encoding="utf-8") as file:
        file.write(to_yaml(config))
    info = dataset_info(config.data.train_dir)
    name = config.data.tokenizer or (info.tokenizer_name if info else None)
    if name and name not in known_tokenizers():
        tokenizer = load_tokenizer(name)
        if isinstance(tokenizer, StoredTokenizer):
            tokenizer.save(os.path.join(config.run_dir, TOKENIZER_FOLDER))


def find_tokenizer(checkpoints_dir: str) -> str | None:
    """The copy that a run keeps, from its checkpoints folder: in it, or in the run folder above."""
    found = (
        stored_tokenizer(f"{folder}/{TOKENIZER_FOLDER}")
        for folder in (checkpoints_dir, os.path.dirname(checkpoints_dir))
    )
    return next(filter(None, found), None)
