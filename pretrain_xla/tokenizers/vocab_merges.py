"""GPT-2's original tokenizer files, a vocabulary and a list of merges, read as a `tokenizer.json`.

Many models have only these (`vocab.json` and `merges.txt`; OpenAI's names are `encoder.json` and `vocab.bpe`). The bytes of a
text are written as printable characters, which are merged in the order of the list.
"""

from __future__ import annotations

import json
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.git_lfs import refuse_pointer
from pretrain_xla.tokenizers.json_tokenizer import byte_level_names
from pretrain_xla.tokenizers.tokenizer import SPECIALS_FILE
from pretrain_xla.untrusted import parse_object

VOCABULARIES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Vocabulary file → merges file."""
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def is_vocabulary(path: str) -> bool:
    """Whether a path is that of such a vocabulary, by its name."""
    return path.rpartition("/")[2] in VOCABULARIES


def as_tokenizer_json(name: str, fs: Any, path: str) -> str:
    """The content of an equivalent `tokenizer.json`.

    Args:
        name: as the user gave it, for messages.
        fs: an fsspec file system.
        path: the vocabulary file on it; the merges, and what else transformers writes, are in the same folder.

    Raises:
        UserError: a file is missing or damaged, or the vocabulary is not byte-level, as GPT-2's is.
    """
    folder, _, file = path.rpartition("/")
    merges_file = f"{folder}/{VOCABULARIES[file]}"
    if not fs.isfile(merges_file):
        raise UserError(f"tokenizer {name!r}: {file} needs {VOCABULARIES[file]} next to it, which is missing")
    vocabulary = parse_object(fs.cat_file(path), path)
    if not all(isinstance(token, int) for token in vocabulary.values()):
        raise UserError(f"tokenizer {name!r}: {file} is no vocabulary: its values are not all numbers")
    missing = [
        byte for byte, text in enumerate(byte_level_names()) if byte not in _NEVER_IN_UTF8 and text not in vocabulary
    ]
    if missing:
        raise UserError(
            f"tokenizer {name!r}: {file} is not byte-level, as GPT-2's is (it has no token for byte 0x{missing[0]:02x}): "
            "open it with transformers, and save it as a tokenizer.json"
        )
    config = _read_json(fs, folder, "tokenizer_config.json")
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(fs, folder, config, vocabulary),
        "normalizer": None,
        "pre_tokenizer": _byte_level(add_prefix_space=bool(config.get("add_prefix_space"))),
        "post_processor": None,
        "decoder": _byte_level(add_prefix_space=True),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": _merges(name, fs.cat_file(merges_file), merges_file)},
    }
    return json.dumps(tree)


def _byte_level(*, add_prefix_space: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}


def _merges(name: str, raw: bytes, path: str) -> list[list[str]]:
    """The pairs, one per line, after a first line with the version."""
    refuse_pointer(raw, path)
    merges = []
    for number, line in enumerate(raw.decode("utf-8", "replace").split("\n"), start=1):
        pair = line.rstrip("\r").split(" ")
        if not line.strip() or line.startswith("#version"):
            continue
        if len(pair) != 2:
            raise UserError(f"tokenizer {name!r}: {path}:{number}: not a pair of tokens")
        merges.append(pair)
    return merges


def _added(fs: Any, folder: str, config: dict[str, Any], vocabulary: dict[str, int]) -> list[dict[str, Any]]:
    """Tokens added to the vocabulary later, by id; text can give those that are not special."""
    specials = _names(config) | _names(_read_json(fs, folder, SPECIALS_FILE))
    found = {
        int(token): (str(text), text in specials) for text, token in _read_json(fs, folder, "added_tokens.json").items()
    }
    for token, stated in (config.get("added_tokens_decoder") or {}).items():
        found[int(token)] = (str(stated["content"]), bool(stated.get("special")))
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": token, "content": text, **options, "special": special}
        for token, (text, special) in sorted(found.items())
        if text not in vocabulary or special
    ]


def _names(tree: dict[str, Any]) -> set[str]:
    """The special tokens that a settings file names."""
    values = [value for key, value in tree.items() if key.endswith("_token")]
    values += tree.get("additional_special_tokens") or []
    return {str(value["content"] if isinstance(value, dict) else value) for value in values if value}


def _read_json(fs: Any, folder: str, file: str) -> dict[str, Any]:
    path = f"{folder}/{file}"
    return parse_object(fs.cat_file(path), path) if fs.isfile(path) else {}
