"""A `tokenizer.json` as text may use it: special tokens cannot be had from text, and nothing is left to chance.

`tokenizers` can be told not to look for special tokens in text, and that is enough for byte-level BPEs, where nothing else
gives them. But a Unigram model has `</s>` among its pieces, as WordPiece and WordLevel have it among their words, and some BPEs
have merges that end in it, or look whole words up (`ignore_merges`): there the model itself finds it, and a text that says
`</s>` ends a document. So text is encoded by a copy of the model in which such pieces have names that no text has, and which is
otherwise the same: it gives the ids that SentencePiece gives, where control symbols cannot be had from text either.

Some models also encode by chance when they are asked to: BPE with `dropout`, Unigram with `nbest_size` and `alpha`. The same
text would give other tokens each time, and a prepared dataset could not be made again.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from pretrain_xla.errors import UserError

NOT_IN_TEXT = "\ufdd0"
"""A code point that Unicode keeps out of all text."""
_CHANCE = ("dropout", "nbest_size", "alpha")


def takes_chance(tree: Any) -> bool:
    """Whether the content of a `tokenizer.json` asks for an encoding by chance."""
    model = tree.get("model") if isinstance(tree, dict) else None
    return isinstance(model, dict) and bool(model.get("dropout") or (model.get("nbest_size") or 0) not in (0, 1))


def without_chance(tokenizer: tokenizers.Tokenizer) -> None:
    """Have a tokenizer encode the same text alike each time."""
    for name in _CHANCE:
        if getattr(tokenizer.model, name, None) is not None:
            setattr(tokenizer.model, name, None)


def encoder_of(name: str, tokenizer: tokenizers.Tokenizer, end_of_text: str) -> tokenizers.Tokenizer | None:
    """The tokenizer to encode text with; none: the tokenizer itself will do.

    A special token of one character stays what text gives: it would be missing there.

    Args:
        name: of the tokenizer, for messages.
        tokenizer: with the end of text declared special, and encoding special tokens as text.
        end_of_text: the token that ends a document.

    Raises:
        UserError: what stands for unknown text is the end of text.
    """
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    model, added = tree["model"], tree["added_tokens"]
    unknown = _unknown(model)
    if unknown == end_of_text and not _knows_all(model):
        raise UserError(
            f"tokenizer {name!r}: {end_of_text} ends a text and stands for unknown text as well, which would end documents "
            'where they do not end: name another in a special_tokens_map.json beside it: {"eos_token": "..."}'
        )
    specials = {token["content"] for token in added if token["special"]} | {unknown or ""}
    if isinstance(model["vocab"], dict):
        specials -= {unknown}  # which these models find by its name
    hidden = _given_by_text(model, {special for special in specials if len(special) > 1})
    if not hidden:
        return None
    # These have their ids from the model. The others stay, as the ids of those after them are counted from theirs.
    tree["added_tokens"] = [token for token in added if token["content"] not in hidden]
    tree["post_processor"] = None
    _hide(model, hidden)
    made = tokenizers.Tokenizer.from_str(json.dumps(tree))
    made.encode_special_tokens = True
    return made


def _unknown(model: dict[str, Any]) -> str | None:
    if isinstance(model["vocab"], list):
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    return model.get("unk_token")


def _knows_all(model: dict[str, Any]) -> bool:
    """Whether it has a token for each byte, so that no text is unknown."""
    return model["type"] == "BPE" and (model.get("byte_fallback") or {"Ġ", "Ċ", "Ã", "ð", "ł"} <= model["vocab"].keys())


def _given_by_text(model: dict[str, Any], specials: set[str]) -> set[str]:
    """Those of the special tokens that the model finds in text."""
    vocabulary = model["vocab"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        words = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys()
        return specials & words
    return specials & {_merged(model, pair) for pair in model["merges"]}


def _merged(model: dict[str, Any], pair: Any) -> str:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return str(left + right.removeprefix(model.get("continuing_subword_prefix") or ""))


def _hide(model: dict[str, Any], hidden: set[str]) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[_renamed(piece, hidden), score] for piece, score in vocabulary]
        return
    model["vocab"] = {_renamed(word, hidden): token for word, token in vocabulary.items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _merged(model, pair) not in hidden]


def _renamed(word: str, hidden: set[str]) -> str:
    return NOT_IN_TEXT + word if word in hidden else word
