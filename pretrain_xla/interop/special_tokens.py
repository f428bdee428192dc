"""Special tokens before and after a text, of a model that was trained elsewhere.

Many models were trained with a token before each text (`<s>`, `<bos>`), and give wrong results without it; some have several
tokens that end a text. We train with one token after each document and none before it, so a model trained here gets none,
whatever its tokenizer's file says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.interop.model_tokenizer import CONFIG_FILE
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer
from pretrain_xla.untrusted import parse_object

GENERATION_FILE = "generation_config.json"
Find = Callable[[str], str | None]


def before_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text when special tokens are requested."""
    if isinstance(tokenizer, JsonTokenizer):
        encoding = tokenizer.tokenizer.encode("a", add_special_tokens=True)
        # The special ids before the first id of the text.
        added = [special == 1 for special in encoding.special_tokens_mask]
        return tuple(encoding.ids[: added.index(False)] if False in added else ())
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.model.bos_id() >= 0:
        return (tokenizer.model.bos_id(),)
    return ()


def adds_bos_token(find: Find) -> bool:
    """Whether a Hugging Face model expects the tokens that its tokenizer puts before a text, if it has any."""
    return _json(find, CONFIG_FILE).get("add_bos_token") is not False


def eos_token_ids(config: Mapping[str, Any], find: Find, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, from config.json and generation_config.json.

    Args:
        config: contents of config.json.
        find: file name → local path, or None if the model has no such file.
        vocab_size: ids of the model; larger ids are defaults of other models, and dropped.
    """
    found: set[int] = set()
    for tree in (config, _json(find, GENERATION_FILE)):
        said = tree.get("eos_token_id")
        found |= {token for token in (said if isinstance(said, list) else [said]) if type(token) is int}
    return tuple(sorted(token for token in found if 0 <= token < vocab_size))


def write_special_tokens(folder: str, *, adds_bos: bool, eos_ids: Sequence[int]) -> None:
    """Write, next to a tokenizer, the files that the two functions above read.

    Args:
        folder: of the tokenizer.
        adds_bos, eos_ids: see `LoadedModel`.
    """
    for name, tree in ((CONFIG_FILE, {"add_bos_token": adds_bos}), (GENERATION_FILE, {"eos_token_id": list(eos_ids)})):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(tree, file)


def _json(find: Find, name: str) -> dict[str, Any]:
    path = find(name)
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:
            return parse_object(file.read(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
