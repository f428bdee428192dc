"""Load a model by name or path, as every command does: its config and its tensors in our names, on the host.

`find_model` reads the config and no tensors (from the Hub, only `config.json`), so that a command line can take the
architecture from it. `load_model` reads everything.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain_xla.config import PRETRAINED_MODELS, build_config
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.interop import hub
from pretrain_xla.interop.hugging_face_folder import hugging_face_source
from pretrain_xla.interop.model_source import LoadedModel, ModelSource
from pretrain_xla.interop.model_tokenizer import GPT2_VOCABULARY
from pretrain_xla.interop.special_tokens import adds_bos_token, eos_token_ids
from pretrain_xla.interop.weights_file import weights_file_source
from pretrain_xla.model import GPT
from pretrain_xla.redact import is_redacted
from pretrain_xla.run_folder.checkpoint import MARKER, CheckpointInfo
from pretrain_xla.run_folder.checkpoint_open import open_checkpoint, weights_prefix
from pretrain_xla.run_folder.files import find_tokenizer
from pretrain_xla.run_folder.tensor_checks import check_names

__all__ = ["LoadedModel", "ModelSource", "find_model", "load_model"]

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def load_model(name_or_path: str, which: str = "newest", stated: Mapping[str, Any] | None = None) -> LoadedModel:
    """Read a model.

    Args:
        name_or_path: a run folder of ours, a folder of checkpoints or one checkpoint (local or any fsspec URL); a Hugging Face
            folder, or a file of weights (`.safetensors` with its config.json; `.pt`, also of nanoGPT and its like); a name
            on the Hugging Face Hub (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, any `owner/name`).
        which: `newest` or `best`, where there are several checkpoints.
        stated: options of `ModelConfig` that the user set; used for what an old file of weights does not state.

    Raises:
        UserError: there is no such model, it is damaged or holds NaN or infinity, or our model cannot compute it.
    """
    return find_model(name_or_path, which, stated).load()


def find_model(name_or_path: str, which: str = "newest", stated: Mapping[str, Any] | None = None) -> ModelSource:
    """Find a model and read its config; arguments and errors are those of `load_model`."""
    if "://" in name_or_path:
        return _checkpoint(name_or_path, which)
    path = os.path.expanduser(name_or_path)
    if os.path.isfile(path):
        if not path.endswith(WEIGHT_FILES):
            raise UserError(f"{name_or_path}: is not a file of weights ({', '.join(WEIGHT_FILES)})")
        return weights_file_source(path, stated or {})
    if os.path.isdir(path):
        return _folder(path, which)
    if name_or_path in PRETRAINED_MODELS:
        return _hub(f"openai-community/{name_or_path}", which)
    if hub.is_name(name_or_path):
        try:
            return _hub(name_or_path, which)
        except UserError as error:
            # `runs/quickstrat` looks like a name on the Hub.
            parent, name = os.path.split(path)
            near = difflib.get_close_matches(name, os.listdir(parent) if os.path.isdir(parent) else [], n=1)
            fix = f"; did you mean {parent}/{near[0]}? And" if near else ", and"
            raise UserError(f"{name_or_path}: no such folder here{fix} {error}") from None
    raise UserError(
        f"{name_or_path}: no such file or folder, and no name on the Hub, which is {', '.join(PRETRAINED_MODELS)} or owner/name"
    )


def _folder(path: str, which: str) -> ModelSource:
    def find(name: str) -> str | None:
        inside = os.path.join(path, name)
        return inside if os.path.isfile(inside) else None

    if find("config.json"):
        return hugging_face_source(find, path)
    _refuse_adapter(find, path)
    return _checkpoint(path, which)


def _hub(repository: str, which: str) -> ModelSource:
    """A model on the Hub: in Hugging Face's format, or a pushed run."""
    if hub.find(repository, "config.json"):
        return hugging_face_source(lambda name: hub.find(repository, name), repository)
    _refuse_adapter(lambda name: hub.find(repository, name), repository)
    return _checkpoint(hub.download_checkpoint(repository, which), which)


def _refuse_adapter(find: Callable[[str], str | None], where: str) -> None:
    """Refuse an adapter saved by `peft`, which holds changes to a model without the model.

    Raises:
        UserError: it is one.
    """
    if find("adapter_config.json"):
        raise UserError(
            f"{where}: an adapter (LoRA and its like), which is not a model: merge it into its model with peft's "
            "merge_and_unload(), save_pretrained() that, and name its folder"
        )


def _checkpoint(path: str, which: str) -> ModelSource:
    notes: list[str] = []
    store, step = open_checkpoint(path, which, notes.append)
    folder, info = store.folder(step), store.info(step)
    if not all(isinstance(info.config.get(section), dict) for section in ("model", "data")):
        raise UserError(f"{folder}/{MARKER} does not say which model it is of, or its data: name another")
    config = build_config({"model": info.config["model"]}, folder).model

    def read() -> dict[str, Tensor]:
        with contextlib.closing(store.stored(step)) as stored:
            prefix = weights_prefix(stored)
            tensors = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
        with torch.device("meta"):
            check_names(tensors, GPT(config).state_dict(), folder)
        return tensors

    tokenizer, guesses = _tokenizer_of(store.root, info, config.vocab_size)
    notes += [f"{folder}: {guess}" for guess in guesses]
    # An imported model that has not been trained here keeps its special tokens.
    adds_bos, eos_ids = _special_tokens_of(tokenizer, config.vocab_size) if not info.data else (False, ())
    return ModelSource(
        config, tokenizer, folder, read, (store, step), notes=tuple(notes), adds_bos=adds_bos, eos_ids=eos_ids
    )


def _special_tokens_of(tokenizer: str | None, vocab_size: int) -> tuple[bool, tuple[int, ...]]:
    """The special tokens before and after a text, as `import` wrote them next to the tokenizer's file."""

    def find(name: str) -> str | None:
        sibling = os.path.join(os.path.dirname(tokenizer or ""), name)
        return sibling if tokenizer is not None and os.path.isfile(sibling) and os.path.isfile(tokenizer) else None

    return adds_bos_token(find), eos_token_ids({}, find, vocab_size)


def _tokenizer_of(checkpoints_dir: str, info: CheckpointInfo, vocab_size: int) -> tuple[str | None, list[str]]:
    """Name of the tokenizer that a run was trained with, from its own copy or its data's manifest; and a note on a guess.

    None means that the run was imported without a tokenizer and has seen no data, or that the tokenizer is unknown.
    """
    if own := find_tokenizer(checkpoints_dir):
        return own, []
    tokenizer, where = (info.config["data"].get(name) for name in ("tokenizer", "train_dir"))
    if isinstance(tokenizer, str) or not isinstance(where, str) or not info.data:
        return tokenizer if isinstance(tokenizer, str) and tokenizer else None, []
    manifest = None if is_redacted(where) else dataset_info(where)
    if manifest is not None:
        return manifest.tokenizer_name, []
    if vocab_size < GPT2_VOCABULARY or is_redacted(where):
        return None, []
    return "gpt2", [
        f"there is no dataset.json in or above {where}: GPT-2's tokenizer is taken (--tokenizer overrides it)"
    ]
