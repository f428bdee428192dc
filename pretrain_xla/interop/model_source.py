"""What is known of a model outside a run: found, and then read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.redact import redacted
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.finite import check_finite


@dataclass(frozen=True)
class LoadedModel:
    """A model on the host.

    config: its architecture. tensors: every parameter of `GPT(config)` by our name, so that `load_state_dict(strict=True)`
    takes them; fp32. tokenizer: what `load_tokenizer` finds its tokenizer by, or none where it came without one. where: what
    was read, for messages. info: what our checkpoint says of its training; none where it is not one of ours. notes: a line on
    each thing that its files do not say and that was guessed. begins: it was trained elsewhere, with what its tokenizer puts
    before a text. ends: ids that end a text, where its files say them.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: str | None
    where: str
    info: CheckpointInfo | None = None
    notes: tuple[str, ...] = ()
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()

    def print_notes(self) -> None:
        """Show the notes where they are in nobody's way."""
        for note in self.notes:
            print(f"note: {redacted(note)}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ModelSource:
    """A model that is found and not yet read.

    read: its tensors, as in `LoadedModel`. checkpoint: where it is one of ours, its store and step; what a run continues from.
    guessed: options that its files do not say, and that a person may know better. notes, begins, ends: see `LoadedModel`.
    """

    config: ModelConfig
    tokenizer: str | None
    where: str
    read: Callable[[], dict[str, Tensor]]
    checkpoint: tuple[CheckpointStore, int] | None = None
    guessed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()

    def load(self) -> LoadedModel:
        """Read the tensors.

        Raises:
            UserError: they cannot be read, or one holds NaN or infinity.
        """
        info = None
        if self.checkpoint is not None:
            store, step = self.checkpoint
            info = store.info(step)
        tensors = self.read()
        check_finite(tensors, self.where)
        return LoadedModel(
            self.config, tensors, self.tokenizer, self.where, info, self.notes, self.adds_bos, self.eos_ids
        )
