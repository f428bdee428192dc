"""Read files of weights, safetensors or PyTorch, single or sharded, as a mapping of name → tensor.

PyTorch files are pickles, and are read with `weights_only=True`: reading one never runs code. Trainers also pickle
their settings objects (`GPTConfig` of nanoGPT's relatives, argparse's `Namespace`). Such an object is read as `SavedObject`,
which only holds its attributes; its class is never imported.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer_at
from pretrain_xla.untrusted import is_inside, parse_object

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = (SINGLE[0], INDEX[0], SINGLE[1], INDEX[1])
# Class names, in any module, that trainers use for their settings.
SETTINGS = re.compile(r"(\w+\.)+(\w*Config|ModelArgs|CfgNode|Namespace|SimpleNamespace)")


class SavedObject:
    """The saved attributes of an object, in `values`, by name. Its class is not imported."""

    def __new__(cls, *arguments: Any) -> SavedObject:
        """Create it empty; positional arguments have no names, and are dropped."""
        made = object.__new__(cls)
        made.values = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        self.values: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.values.update(part)


def read_file(path: str) -> dict[str, Any]:
    """Contents of a file: tensors by name, and in a PyTorch file everything else that was saved.

    Raises:
        UserError: it cannot be read, or would run code.
    """
    refuse_pointer_at(path)
    try:
        tree = dict(load_file(path)) if path.endswith(".safetensors") else _unpickle(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({_brief(error)})") from None
    if isinstance(tree, SavedObject):
        tree = tree.values
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    return tree


def read_folder(find: Callable[[str], str | None], where: str) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder.

    Args:
        find: file name → local path, or None if the folder has no such file.
        where: the folder, for messages.

    Raises:
        UserError: there are no weights, a shard is missing or lies outside the folder, or a file is damaged.
    """
    for name in WEIGHTS:
        path = find(name)
        if path is None:
            continue
        if name in SINGLE:
            return read_file(path)
        tensors: dict[str, Tensor] = {}
        for shard in _shards(path):
            found = find(shard)
            if found is None:
                raise UserError(f"{where}: {shard} is missing, which {name} names")
            tensors |= read_file(found)
        return tensors
    raise UserError(f"{where}: no weights there ({', '.join(SINGLE)}, or their shards)")


def _shards(path: str) -> list[str]:
    """The files that an index names."""
    try:
        with open(path, "rb") as file:
            names = parse_object(file.read(), path)["weight_map"].values()
    except (OSError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path}: is not an index of shards ({type(error).__name__}: {error})") from None
    shards = sorted({str(name) for name in names})
    for shard in shards:
        if not is_inside(shard):
            raise UserError(f"{path}: names {shard!r}, which is not a file below its folder: do not trust it")
    return shards


def _unpickle(path: str) -> Any:
    """Read a PyTorch file, memory-mapped if it has the zip format (PyTorch 1.6 and later)."""
    is_zip = zipfile.is_zipfile(path)
    foreign = _check_zip(path) if is_zip else _names_in_old(path)
    settings = [(SavedObject, name) for name in foreign if SETTINGS.fullmatch(name)]
    try:
        with torch.serialization.safe_globals(settings):  # type: ignore[arg-type]
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        names = [name for name in foreign if not SETTINGS.fullmatch(name)]
        raise UserError(
            f"{path}: holds more than tensors{f' ({names[0]})' if names else ''}, and reading it would run code; save its "
            "state dict alone, with torch.save"
        ) from None
    except Exception as error:  # a damaged pickle ends in whatever error its first wrong byte causes
        raise UserError(f"{path}: cannot be read ({_brief(error)})") from None
    _check_sizes(tree, path)
    return tree


def _check_zip(path: str) -> list[str]:
    """Names of classes and functions in the file that are not PyTorch's own. Refuses compressed parts, which torch.save never
    writes.

    A compressed part of a few KB could expand to any amount of memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise UserError(f"{path}: its parts are packed, as torch.save never writes them: save it again")
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except UserError:
        raise
    except Exception as error:  # as in `_unpickle`
        raise UserError(f"{path}: cannot be read ({_brief(error)})") from None


def _names_in_old(path: str) -> list[str]:
    """As `_check_zip`, for the format before PyTorch 1.6: four pickles, then the numbers."""
    names: set[str] = set()
    with open(path, "rb") as file, contextlib.suppress(Exception):  # damage is reported when it is read
        for _ in range(4):  # magic number, version, system information, saved object
            found = (argument for operation, argument, _ in pickletools.genops(file) if operation.name == "GLOBAL")
            names |= {str(argument).replace(" ", ".") for argument in found}
    return sorted(names - torch._weights_only_unpickler._get_allowed_globals().keys())


def _check_sizes(tree: Any, path: str) -> None:
    """Refuse a tensor with more elements than its storage: materialised, it could be of any size."""
    waiting, seen = [tree], set()  # a pickle may hold itself
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{path}: a tensor of {tuple(value.shape)} repeats what was saved of it: save it again")
        elif isinstance(value, dict):
            waiting += value.values()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
