"""A model in Hugging Face's format, in a local folder or on the Hub, described by its `config.json`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.interop.config_json import read_config
from pretrain_xla.interop.model_source import ModelSource
from pretrain_xla.interop.model_tokenizer import find_model_tokenizer
from pretrain_xla.interop.special_tokens import adds_bos_token, eos_token_ids
from pretrain_xla.interop.tensors import from_hugging_face
from pretrain_xla.interop.weights import read_folder
from pretrain_xla.untrusted import parse_object


def hugging_face_source(
    find: Callable[[str], str | None], where: str, weights: Callable[[], dict[str, Tensor]] | None = None
) -> ModelSource:
    """A folder with a config.json.

    Args:
        find: file name → local path, or None if the folder has no such file.
        where: the folder, for messages.
        weights: reads the tensors by their Hugging Face names. None means from the standard files.

    Raises:
        UserError: config.json is damaged, or describes a model that ours cannot compute.
    """
    path = find("config.json")
    assert path is not None
    try:
        with open(path, "rb") as file:
            tree = parse_object(file.read(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    family, config = read_config(tree, f"{where}/config.json")

    def read() -> dict[str, Tensor]:
        tensors = weights() if weights is not None else read_folder(find, where)
        return from_hugging_face(tensors, config, family.layout, where)

    tokenizer, notes = find_model_tokenizer(find, config.vocab_size, where)
    eos_ids = eos_token_ids(tree, find, config.vocab_size)
    return ModelSource(config, tokenizer, where, read, notes=notes, adds_bos=adds_bos_token(find), eos_ids=eos_ids)
