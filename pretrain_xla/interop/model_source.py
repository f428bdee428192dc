"""A model to load: `ModelSource` once it is found, `LoadedModel` once its tensors are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.redact import redacted
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.tensor_checks import check_finite


@dataclass(frozen=True)
class LoadedModel:
    """A model on the host.

    config: its architecture. tensors: every parameter of `GPT(config)` by our name, so that `load_state_dict(strict=True)`
    takes them; fp32. tokenizer: its name or path for `load_tokenizer`, None if it has none. where: its location, for messages.
    info: the state of training, None unless it is a checkpoint of ours. notes: a line on each setting that was guessed.
    adds_bos: it was trained elsewhere, with the tokens that its tokenizer puts before a text. eos_ids: ids that end a text, if
    its files state them.
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
        """Print the notes on stderr."""
        for note in self.notes:
            print(f"note: {redacted(note)}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ModelSource:
    """A model whose config is known and whose tensors are not read yet.

    read: reads its tensors, as in `LoadedModel`. checkpoint: store and step, if it is a checkpoint of ours, from which a run
    continues. guessed: options that its files do not state, and that the user may correct. notes, adds_bos, eos_ids: see
    `LoadedModel`.
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
