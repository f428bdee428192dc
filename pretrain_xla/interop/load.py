"""One way in for every door: whatever a person names as a model becomes our config and our tensors, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain_xla.config import PRETRAINED_MODELS, ModelConfig, build_config
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.interop.gpt2 import gpt2_config, load_gpt2
from pretrain_xla.train.checkpoint import open_checkpoint
from pretrain_xla.train.files import find_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model on the host.

    config: its architecture. tensors: every parameter of `GPT(config)` by our name, so that `load_state_dict(strict=True)`
    takes them; fp32. tokenizer: what `load_tokenizer` finds its tokenizer by, or none where it came without one. where: what
    was read, for messages.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: str | None
    where: str


def load_model(name_or_path: str, which: str = "newest") -> LoadedModel:
    """Read a model.

    Args:
        name_or_path: a run folder of ours, a folder of checkpoints or one checkpoint (local or any fsspec URL); or a name on
            the Hugging Face Hub (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`).
        which: `newest` or `best`, where there are several checkpoints.

    Raises:
        UserError: nothing there, or something that is damaged or that our model cannot compute.
    """
    if name_or_path in PRETRAINED_MODELS:
        config = gpt2_config(name_or_path)
        tensors = load_gpt2(name_or_path, config)
        return LoadedModel(config, tensors, "gpt2", f"openai-community/{name_or_path}")
    return _load_checkpoint(name_or_path, which)


def _load_checkpoint(path: str, which: str) -> LoadedModel:
    store, step = open_checkpoint(path, which)
    folder, info = store.folder(step), store.info(step)
    config = build_config({"model": info.config["model"]}, folder).model
    prefix = "model."
    tensors = {n.removeprefix(prefix): t for n, t in store.load(step).items() if n.startswith(prefix)}
    return LoadedModel(config, tensors, _tokenizer_of(store.root, info.config), folder)


def _tokenizer_of(checkpoints_dir: str, config: dict[str, Any]) -> str:
    """Name of the tokenizer that a run was trained with: its own copy, or what its data's manifest says."""
    if own := find_tokenizer(checkpoints_dir):
        return own
    named = config["data"]["tokenizer"]
    info = None if named else dataset_info(config["data"]["train_dir"])
    return named or (info.tokenizer_name if info else "gpt2")
