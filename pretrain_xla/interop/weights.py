"""Reading files of weights: safetensors and PyTorch's own, whole or in shards, as a mapping of name → tensor.

PyTorch files are read with `weights_only=True`: a downloaded file can bring tensors, never code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain_xla.errors import UserError

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = (SINGLE[0], INDEX[0], SINGLE[1], INDEX[1])


def read_file(path: str) -> dict[str, Any]:
    """What a file holds: tensors by name, and in a PyTorch file whatever else was saved with them.

    Raises:
        UserError: it cannot be read, or would run code.
    """
    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors, and reading it would run code; save its state dict alone, with torch.save"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    return tree


def read_folder(find: Callable[[str], str | None], where: str) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder.

    Args:
        find: the local path of a file of the folder, or none where it has no such file.
        where: the folder, for messages.

    Raises:
        UserError: there are no weights, a shard is missing, or a file is damaged.
    """
    for name in WEIGHTS:
        path = find(name)
        if path is None:
            continue
        if name in SINGLE:
            return read_file(path)
        try:
            with open(path, encoding="utf-8") as file:
                shards = sorted({str(shard) for shard in json.load(file)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is no index of shards ({type(error).__name__}: {error})") from None
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            found = find(shard)
            if found is None:
                raise UserError(f"{where}: {shard} is missing, which {name} names")
            tensors |= read_file(found)
        return tensors
    raise UserError(f"{where}: no weights there ({', '.join(SINGLE)}, or their shards)")
