"""A model as a folder that plain `transformers` opens: `config.json`, `model.safetensors`, tokenizer and model card."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from pretrain_xla.errors import UserError
from pretrain_xla.interop.config_json import choose_family, write_config
from pretrain_xla.interop.load import LoadedModel
from pretrain_xla.interop.model_card import model_card
from pretrain_xla.interop.special_tokens import before_text
from pretrain_xla.interop.tensors import to_hugging_face
from pretrain_xla.interop.tokenizer_files import write_tokenizer
from pretrain_xla.model.layers import make_norm
from pretrain_xla.run_folder.tensor_checks import check_finite
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_model(
    loaded: LoadedModel, folder: str, *, dtype: str = "fp32", shard_size: str = "5GB", title: str | None = None
) -> list[str]:
    """Write a model for `AutoModelForCausalLM.from_pretrained(folder)`.

    Args:
        loaded: the model.
        folder: to write to; it must be new or empty.
        dtype: `fp32` (exact) or `bf16` (half the size).
        shard_size: largest size of a file of weights.
        title: name of the model in its model card. None means the name of the folder.

    Returns:
        Notes for the user, such as a tokenizer that was left out.

    Raises:
        UserError: no architecture computes this model, its weights hold NaN or infinity, or the folder cannot be written.
    """
    loaded = fold_embedding_norm(loaded)
    config = loaded.config
    family = choose_family(config)
    check_finite(loaded.tensors, loaded.where)
    make_empty_folder(folder)
    tokenizer, notes = _tokenizer(loaded)
    end = tokenizer.end_of_text if tokenizer is not None else None
    before = before_text(tokenizer) if tokenizer is not None and loaded.adds_bos else ()
    others = sorted({*loaded.eos_ids} - {end}) if end is not None else []
    # Written even if None: some architectures default to the ids of another tokenizer.
    special_ids = {"bos_token_id": before[0] if before else end, "eos_token_id": [end, *others] if others else end}
    name = str(DTYPES[dtype]).removeprefix("torch.")
    tree = write_config(family, config) | special_ids | {"pad_token_id": None, "torch_dtype": name, "use_cache": True}
    try:
        tensors = to_hugging_face(loaded.tensors, config, family.layout)
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        save_torch_state_dict(tensors, folder, max_shard_size=shard_size, metadata={"format": "pt"})
        write_json(os.path.join(folder, "config.json"), tree)
        _share(folder)
        write_json(
            os.path.join(folder, "generation_config.json"), {k: v for k, v in special_ids.items() if v is not None}
        )
        if tokenizer is not None:
            notes += write_tokenizer(tokenizer, folder, config.seq_length, adds_bos=loaded.adds_bos)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            title = title or os.path.basename(os.path.abspath(folder))
            file.write(model_card(loaded, family, title, has_tokenizer=tokenizer is not None))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}): name another folder") from None
    return notes


def fold_embedding_norm(loaded: LoadedModel) -> LoadedModel:
    """The same model without a norm after the embedding, where there is one: with each row of the table normalised.

    A tied head reads the rows as they are, so there the norm stays, and no architecture of transformers has it.
    """
    config = loaded.config
    if not config.embedding_norm or config.tie_weights:
        return loaded
    norm = make_norm(config, torch.float32)
    own = {name: value for name, value in loaded.tensors.items() if name.startswith("embedding_norm.")}
    norm.load_state_dict({name.removeprefix("embedding_norm."): value for name, value in own.items()})
    with torch.no_grad():
        table_VD = norm(loaded.tensors["embedding.weight"])
    tensors = {name: value for name, value in loaded.tensors.items() if name not in own} | {
        "embedding.weight": table_VD
    }
    return dataclasses.replace(loaded, config=config.model_copy(update={"embedding_norm": False}), tensors=tensors)


def _tokenizer(loaded: LoadedModel) -> tuple[Tokenizer | None, list[str]]:
    """The model's tokenizer. None, with a note, if there is none, it cannot be loaded, or it is larger than the model."""
    if loaded.tokenizer is None:
        return None, ["this model came without a tokenizer, so none is written"]
    try:
        tokenizer = load_tokenizer(loaded.tokenizer)
    except UserError as error:
        if loaded.tokenizer in known_tokenizers():
            raise  # it only has to be downloaded
        return None, [f"its tokenizer is left out: {error}"]
    if tokenizer.vocab_size > loaded.config.vocab_size:
        return None, [
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and the model {loaded.config.vocab_size}: it is "
            "not the model's, and is not written"
        ]
    return tokenizer, []


def make_empty_folder(folder: str) -> None:
    """Make a folder to write to.

    Raises:
        UserError: it is not empty, or cannot be created.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UserError(f"{folder}: is not empty; name a new folder, or remove what is in it")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): name another folder") from None


def _share(folder: str) -> None:
    """Give the weights the permissions of other new files: safetensors makes them readable by the owner only."""
    mode = os.stat(os.path.join(folder, "config.json")).st_mode
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            os.chmod(os.path.join(folder, name), mode)


def write_json(path: str, tree: dict[str, Any]) -> None:
    """Write a JSON file as transformers formats it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=2, sort_keys=True)
        file.write("\n")
