"""A single file of weights: safetensors with its config.json, or an old PyTorch checkpoint that holds its own settings.

Old checkpoints are those of nanoGPT and its many relatives, and of earlier trainers of GPT-2: a dictionary with the state dict
under `model` or alone, and numbers of the architecture under `model_args` or `config`, as a mapping or as an object. Their
modules are GPT-2's, with differences that are handled here: prefixes of wrappers, `gamma` and `beta` for a norm's weight and
bias, and plain linear layers instead of GPT-2's transposed ones. `inferred.py` finds the form of GELU and the number of heads.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig, build_config
from pretrain_xla.errors import UserError
from pretrain_xla.interop.hugging_face_folder import hugging_face_source
from pretrain_xla.interop.inferred import infer_activation, infer_heads
from pretrain_xla.interop.layouts import GPT2_LAYOUT
from pretrain_xla.interop.model_source import ModelSource
from pretrain_xla.interop.model_tokenizer import find_model_tokenizer
from pretrain_xla.interop.tensors import CONSTANTS, from_hugging_face, strip_prefixes
from pretrain_xla.interop.weights import SavedObject, read_file

STATE_KEYS = ("model", "model_state_dict", "state_dict", "model_state")
SHAPE_KEYS = ("model_args", "model_config", "config", "args", "hparams", "hyper_parameters")

INNER = re.compile(r"transformer\.h\.(\d+)\.(.+)\.\w+")
MATRICES = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.mlp.c_fc.weight",
)


def weights_file_source(path: str, stated: Mapping[str, Any]) -> ModelSource:
    """One file of weights.

    Args:
        path: the file.
        stated: options that the user set; used if the file does not state them.

    Raises:
        UserError: it cannot be read, is of another kind, or its number of heads is unknown.
    """
    folder = os.path.dirname(path) or "."

    def find(name: str) -> str | None:
        inside = os.path.join(folder, name)
        return inside if os.path.isfile(inside) else None

    if find("config.json"):
        return hugging_face_source(find, path, lambda: _state(read_file(path)))
    saved = read_file(path)
    state = _state(saved)
    tensors = _with_gpt2_names(state)
    _check_names(tensors, path)
    shape = _shape(saved)
    heads, heads_note = infer_heads(tensors, shape, stated, path)
    masked = any(name.endswith(".attn.bias") for name in state)
    activation, guess = infer_activation(shape, stated, transposed=_is_transposed(tensors), masked=masked)
    config = _config(tensors, heads, activation, path)
    tokenizer, notes = find_model_tokenizer(find, config.vocab_size, path)
    notes += tuple(f"{path}: {note}" for note in (heads_note, guess) if note)
    guessed = {name for name, note in (("num_heads", heads_note), ("activation", guess)) if note}
    layout = replace(GPT2_LAYOUT, transposed=_is_transposed(tensors))
    read = functools.partial(from_hugging_face, tensors, config, layout, path)
    return ModelSource(config, tokenizer, path, read, guessed=frozenset(guessed), notes=notes)


def _state(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the model, under whichever key they were saved."""
    inside = next((saved[key] for key in STATE_KEYS if isinstance(saved.get(key), dict)), saved)
    return {name: value for name, value in inside.items() if isinstance(value, Tensor)}


def _shape(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture settings that were saved with it, also one level down (`hyper_parameters` with a `config`)."""
    found: dict[str, Any] = {}
    for outer in (_mapping(saved.get(key)) for key in SHAPE_KEYS):
        found = outer | found
        for key in SHAPE_KEYS:
            found = _mapping(outer.get(key)) | found
    return found


def _mapping(value: Any) -> dict[str, Any]:
    """The named values of a mapping or an object."""
    named = value.values if isinstance(value, SavedObject) else value
    return {str(key): inner for key, inner in named.items()} if isinstance(named, dict) else {}


def _with_gpt2_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    spelled = {}
    for name, tensor in strip_prefixes(tensors, GPT2_LAYOUT).items():
        if not name.endswith(CONSTANTS):
            spelled[name.replace(".gamma", ".weight").replace(".beta", ".bias")] = tensor
    return spelled


def _check_names(tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse tensors that are not named as in GPT-2; the message names one."""
    inside = {name: INNER.fullmatch(name) for name in tensors if name.startswith("transformer.h.")}
    foreign = [name for name in tensors if not name.startswith(("transformer.", "lm_head."))]
    foreign += [name for name, match in inside.items() if match is None]
    foreign += sorted({match[2] for match in inside.values() if match} - set(GPT2_LAYOUT.inner.values()))
    missing = [name for name in MATRICES if name not in tensors]
    if missing or foreign:
        shown = foreign[0] if foreign else next(iter(tensors), "nothing")
        raise UserError(
            f"{path}: there is no config.json in its folder, and its tensors are not those of a GPT-2 or nanoGPT (it has "
            f"{shown.removeprefix('transformer.')!r}"
            f"{', and no ' + missing[0].removeprefix('transformer.') if missing else ''}): give it a config.json of an "
            "architecture that `python -m pretrain_xla export` writes, with its tensors named so"
        )
    for name in MATRICES:
        if tensors[name].dim() != 2:
            raise UserError(f"{path}: {name.removeprefix('transformer.')} has {tensors[name].dim()} dimensions, not 2")


def _is_transposed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether matrices are stored as [in, out]: the fused query, key and value is three times as long one way."""
    rows, columns = tensors["transformer.h.0.attn.c_attn.weight"].shape
    return bool(columns == 3 * rows)


def _config(tensors: Mapping[str, Tensor], heads: int, activation: str, path: str) -> ModelConfig:
    """The config: sizes from the shapes of tensors, number of heads and activation as given."""
    vocabulary, width = tensors["transformer.wte.weight"].shape
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")}
    head = tensors.get("lm_head.weight")
    up = tensors["transformer.h.0.mlp.c_fc.weight"]
    transposed = _is_transposed(tensors)
    options = {
        "vocab_size": vocabulary,
        "vocab_multiple": 1 if vocabulary % 128 else 128,
        "seq_length": tensors["transformer.wpe.weight"].shape[0],
        "d_model": width,
        "num_layers": len(layers),
        "num_heads": heads,
        "d_ff": up.shape[1 if transposed else 0],
        "activation": activation,
        "bias": any(name.endswith(".bias") for name in tensors),
        "tie_weights": head is None or torch.equal(head, tensors["transformer.wte.weight"].to(head.dtype)),
    }
    return build_config({"model": options}, path).model
