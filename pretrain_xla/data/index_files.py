"""Files next to a shard that describe it: the index of litdata, the index of Megatron, and nanoGPT's `meta.pkl`.

A pickle can call any function when it is opened. This one is read by an unpickler that refuses all names, so it holds plain
values or is not read.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain_xla.errors import UserError
from pretrain_xla.untrusted import parse_object

ReadSibling = Callable[[str], bytes | None]
"""Returns the content of a file in the shard's folder. None means that there is no such file."""

META = "meta.pkl"
_LITDATA_INDEX = "index.json"
_TORCH_TYPES = {11: "u1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_NUMPY_TYPES = {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"}
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MOST_META = 2**26  # bytes
_MOST_CHARACTERS = 2**21


def litdata_chunk(where: str, size: int, head: bytes, read_sibling: ReadSibling) -> tuple[np.dtype[Any], int] | None:
    """(type of the ids, bytes before the first) of a chunk of litdata, as litgpt prepares them. None means it is not a chunk.

    A chunk begins with the number n of its items and n + 1 offsets, uint32; the first offset is where the ids begin. Their
    type is in `index.json`.

    Raises:
        UserError: the chunk does not hold token ids, or its index is missing.
    """
    words = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    if len(words) < 3 or not 0 < words[0] < 2**28 or int(words[1]) != 4 * (int(words[0]) + 2) or words[2] < words[1]:
        return None
    name = where.rpartition("/")[2]
    raw = read_sibling(_LITDATA_INDEX)
    if raw is None:
        if not re.fullmatch(r"chunk-\d+-\d+\.bin", name):
            return None
        raise UserError(
            f"{where}: a chunk of litdata without its {_LITDATA_INDEX} in the same folder: copy it there, too"
        )
    index = parse_object(raw, f"{where.removesuffix(name)}{_LITDATA_INDEX}")
    config, chunks = index.get("config"), index.get("chunks")
    formats = config.get("data_format") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(formats, list):
        return None
    kind, _, number = str(formats[0]).partition(":") if len(formats) == 1 else ("", "", "")
    types = {"no_header_tensor": _TORCH_TYPES, "no_header_numpy": _NUMPY_TYPES}.get(kind, {})
    found = types.get(int(number)) if number.isdecimal() else None
    if found is None or config.get("encryption"):
        raise UserError(
            f"{where}: a chunk of litdata that holds {', '.join(map(str, formats))[:100]}, not plain token ids: write it "
            "with TokensLoader, or prepare the text"
        )
    listed = [chunk for chunk in chunks or () if isinstance(chunk, dict) and chunk.get("filename") == name]
    if not listed or not isinstance(listed[0].get("dim"), int):
        # Items of other loaders begin with their size, which would be read as an id.
        raise UserError(
            f"{where}: its {_LITDATA_INDEX} does not have its number of ids (dim): write it with TokensLoader"
        )
    return np.dtype(found), int(words[1])


def megatron_dtype(where: str, read_sibling: ReadSibling) -> np.dtype[Any] | None:
    """The type of the ids of a Megatron `.bin`, by its `.idx`. None means that there is no `.idx`.

    Raises:
        UserError: the index says that they are not ids.
    """
    name = where.rpartition("/")[2]
    raw = read_sibling(f"{name.removesuffix('.bin')}.idx") if name.endswith(".bin") else None
    if raw is None or not raw.startswith(_MEGATRON_MAGIC) or len(raw) < 18:
        return None
    if raw[17] not in _MEGATRON_TYPES:
        raise UserError(f"{where}: its .idx says that it holds numbers of type {raw[17]}, not token ids")
    return np.dtype(_MEGATRON_TYPES[raw[17]])


@dataclass(frozen=True)
class Meta:
    """nanoGPT's `meta.pkl`: a vocabulary of characters."""

    characters: dict[int, str]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return max(self.characters) + 1

    def decode(self, ids: list[int]) -> str:
        """The text of ids; an unknown id becomes U+FFFD."""
        return "".join(self.characters.get(token, "\ufffd") for token in ids)


def read_meta(raw: bytes, where: str) -> Meta | None:
    """The vocabulary of a `meta.pkl`. None means that it has none.

    Raises:
        UserError: it would call functions, or is damaged.
    """
    if len(raw) > _MOST_META:
        raise UserError(f"{where}: {len(raw):,} bytes are too many for a vocabulary of characters: remove it")
    try:
        tree = _Unpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a damaged pickle can raise nearly any error
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{where}: not a plain pickle ({reason}), so it is not opened: remove it") from None
    found = tree.get("itos") if isinstance(tree, dict) else None
    if isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict) or not 0 < len(found) <= _MOST_CHARACTERS:
        return None
    if not all(type(key) is int and key >= 0 and isinstance(value, str) for key, value in found.items()):
        return None
    return Meta(found)


class _Unpickler(pickle.Unpickler):
    """Refuses all names, so it reads dicts, lists, numbers and strings only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside it")
