"""Keeps the special tokens of a `tokenizer.json` out of what text is encoded to.

`tokenizers` can be told not to look for special tokens in text, and for byte-level BPE that is enough. But a Unigram model has
`</s>` in its own vocabulary, as WordPiece and WordLevel have; some BPEs have merges that end in it, or look up whole words
(`ignore_merges`). There the model itself finds it, and a text that says `</s>` would end a document. So text is encoded by a
copy of the model in which such tokens have names that no text contains. Otherwise the copy is the same, and gives the ids that
SentencePiece gives, where text cannot give control symbols either.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from pretrain_xla.errors import UserError

NOT_IN_TEXT = "\ufdd0"
"""A Unicode noncharacter; text that contains it nevertheless is encoded with U+FFFD in its place."""


def text_encoder(name: str, tokenizer: tokenizers.Tokenizer, end_of_text: str) -> tokenizers.Tokenizer | None:
    """The tokenizer to encode text with; None means that `tokenizer` itself is safe.

    Text can still give a special token of one character, which would otherwise be missing from the text.

    Args:
        name: of the tokenizer, for messages.
        tokenizer: with the end of text declared special, and encoding special tokens as text.
        end_of_text: the token that ends a document.

    Raises:
        UserError: the token for unknown text is also the end of text.
    """
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    model, added = tree["model"], tree["added_tokens"]
    unknown = _unknown(model)
    if unknown == end_of_text and not _has_all_bytes(model):
        raise UserError(
            f"tokenizer {name!r}: {end_of_text} is both the end of a text and the token for unknown text, so documents would "
            'end in the wrong places: name another in a special_tokens_map.json next to it: {"eos_token": "..."}'
        )
    specials = {token["content"] for token in added if token["special"]} | {unknown or ""}
    if isinstance(model["vocab"], dict):
        specials -= {unknown}  # these models look it up by its name
    hidden = _found_in_text(model, {special for special in specials if len(special) > 1})
    if not hidden:
        return None
    # The model gives the hidden ones their ids. The others must stay, because later ids are counted from theirs.
    tree["added_tokens"] = [token for token in added if token["content"] not in hidden]
    tree["post_processor"] = None
    _hide(model, hidden)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(tree))
    encoder.encode_special_tokens = True
    return encoder


def _unknown(model: dict[str, Any]) -> str | None:
    if isinstance(model["vocab"], list):
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    return model.get("unk_token")


def _has_all_bytes(model: dict[str, Any]) -> bool:
    """Whether it has a token for each byte, so that no text is unknown."""
    return model["type"] == "BPE" and (model.get("byte_fallback") or {"Ġ", "Ċ", "Ã", "ð", "ł"} <= model["vocab"].keys())


def _found_in_text(model: dict[str, Any], specials: set[str]) -> set[str]:
    """Those of the special tokens that the model finds in text."""
    vocabulary = model["vocab"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        tokens = {token for token, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys()
        return specials & tokens
    return specials & {_merged(model, pair) for pair in model["merges"]}


def _merged(model: dict[str, Any], pair: Any) -> str:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return str(left + right.removeprefix(model.get("continuing_subword_prefix") or ""))


def _hide(model: dict[str, Any], hidden: set[str]) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[_renamed(token, hidden), score] for token, score in vocabulary]
        return
    model["vocab"] = {_renamed(token, hidden): number for token, number in vocabulary.items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _merged(model, pair) not in hidden]


def _renamed(token: str, hidden: set[str]) -> str:
    return NOT_IN_TEXT + token if token in hidden else token
