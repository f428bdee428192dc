"""A folder in Hugging Face's form, on a disk or on the Hub: `config.json` says what it is, and its tensors follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop.description import Description
from pretrain_xla.interop.mapping import read_config
from pretrain_xla.interop.tensors import to_ours
from pretrain_xla.interop.weights import read_folder

GPT2_VOCABULARY = 50257


def describe_folder(
    find: Callable[[str], str | None], where: str, weights: Callable[[], dict[str, Tensor]] | None = None
) -> Description:
    """A folder with a config.json.

    Args:
        find: the local path of a file of the folder, or none where it has no such file.
        where: the folder, for messages.
        weights: how to read the tensors under their names; none: from the files that Hugging Face names.

    Raises:
        UserError: config.json is damaged, or describes what our model cannot compute.
    """
    path = find("config.json")
    assert path is not None
    family, config = read_config(_read_json(path), f"{where}/config.json")

    def read() -> dict[str, Tensor]:
        tensors = weights() if weights is not None else read_folder(find, where)
        return to_ours(tensors, config, family.layout, where)

    return Description(config, _tokenizer(find, config), where, read)


def _tokenizer(find: Callable[[str], str | None], config: ModelConfig) -> str | None:
    """The folder's own tokenizer.json; GPT-2's where there is none and the vocabulary is as large as GPT-2's."""
    own = find("tokenizer.json")
    if own is not None:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            find(name)  # of the Hub: fetched beside it, for the end-of-text that they name
        return own
    return "gpt2" if config.vocab_size == GPT2_VOCABULARY else None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no mapping of settings")
    return tree
