"""Write any of our tokenizers as a `tokenizer.json` that `AutoTokenizer` opens.

tiktoken's vocabularies are byte strings in the order in which they were merged, from which the merges are computed.
`sentencepiece_json` converts SentencePiece models. Bytes are a vocabulary of 256 with no merges. The result is compared with
the original on text that is hard to split.
"""

from __future__ import annotations

import itertools
import json
import os

import tokenizers
from tiktoken import Encoding
from tokenizers import Regex, decoders, models, pre_tokenizers

from pretrain_xla.interop import sentencepiece_json
from pretrain_xla.interop.special_tokens import before_text
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer
from pretrain_xla.tokenizers.fingerprint import TEXT
from pretrain_xla.tokenizers.json_tokenizer import JsonTokenizer
from pretrain_xla.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain_xla.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from pretrain_xla.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

PROBE = (
    "Hello  world! It's 12345 o'clock,\n\n\tdon't YOU'LL see?\r\n  x_BTD = f(3.14e-5);  naïve café, Ελλάδα, Привет, "
    "東京タワー 한국어 🙂👩‍👩‍👧 \u00a0 \u200b end   \n"
)

ODD = ("", "  ", "\n\n", " a", "a  b  ", "<s> </s> <unk> <0x0A> <|endoftext|>", "\u3000x\x00\x01", "ａｂｃ ｶﾞ ﷺ")


def write_tokenizer(tokenizer: Tokenizer, folder: str, seq_length: int, *, adds_bos: bool = False) -> list[str]:
    """Write the files of a tokenizer into a folder; returns a note if it cannot be written, and is left out.

    Args:
        tokenizer: the model's.
        folder: to write to.
        seq_length: longest input of the model, in tokens.
        adds_bos: see `LoadedModel.adds_bos`; if False, transformers adds no special tokens, as in our training.
    """
    made = _as_json(tokenizer)
    if made is not None and not adds_bos:
        made = _without_special_tokens(made)
    if made is None or any(made.encode(text) != tokenizer.encode(text) for text in (PROBE, TEXT, *ODD)):
        return [
            f"tokenizer {tokenizer.name!r} has no equal tokenizer.json, so none is written; pass its ids by yourself"
        ]
    made.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):  # llama.cpp reads this one
        with open(os.path.join(folder, tokenizer.file_name), "wb") as model:
            model.write(tokenizer.content)
    end = made.tokenizer.id_to_token(made.end_of_text)
    begin = next(iter(before_text(made)), made.end_of_text)
    tree = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": made.tokenizer.id_to_token(begin),
        "eos_token": end,
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=2)
    return []


def _as_json(tokenizer: Tokenizer) -> JsonTokenizer | None:
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        same = sentencepiece_json.as_tokenizer(tokenizer.model)
        end = tokenizer.model.id_to_piece(tokenizer.end_of_text)
        return None if same is None else JsonTokenizer.of(tokenizer.name, same.to_str(), end)
    if isinstance(tokenizer, BytesTokenizer):
        return _byte_level(tokenizer, {bytes([value]): value for value in range(256)}, [], None)
    if isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        ranks = {encoding.decode_single_token_bytes(rank): rank for rank in _ranks(encoding)}
        # `++`, `?+` and `*+` are possessive in both libraries, `}+` only in tiktoken.
        pattern = encoding._pat_str.replace("}+", "}")
        return _byte_level(tokenizer, ranks, _merges(ranks), pattern)
    return None


def _without_special_tokens(tokenizer: JsonTokenizer) -> JsonTokenizer:
    """The tokenizer without the special tokens that its file adds to a text."""
    if not tokenizer.tokenizer.num_special_tokens_to_add(is_pair=False):
        return tokenizer
    tree = json.loads(tokenizer.tokenizer.to_str())
    bare = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": None}))
    bare.encode_special_tokens = True  # not stored in the file
    return JsonTokenizer(tokenizer.name, bare, tokenizer.end_of_text, tokenizer.encoder)


def _ranks(encoding: Encoding) -> list[int]:
    specials = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    known = []
    for token in range(encoding.n_vocab):
        if token in specials:
            continue
        try:
            encoding.decode_single_token_bytes(token)
        except KeyError:
            continue  # a gap in the numbering
        known.append(token)
    return known


def _byte_level(
    tokenizer: Tokenizer, ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], pattern: str | None
) -> JsonTokenizer:
    """A byte-level BPE of `tokenizers`, whose bytes are written as printable characters."""
    alphabet = _byte_characters()
    words = {word: "".join(alphabet[byte] for byte in word) for word in ranks}
    vocabulary = {words[word]: rank for word, rank in ranks.items()}
    pairs = [(words[left], words[right]) for left, right in merges]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=bool(merges)))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    # An added token takes the next free id; the gaps before the end-of-text of some encodings are filled by name.
    while made.get_vocab_size() < tokenizer.end_of_text:
        made.add_special_tokens([f"<|unused_{made.get_vocab_size()}|>"])
    made.add_special_tokens([END_OF_TEXT])
    made.encode_special_tokens = True
    return JsonTokenizer(tokenizer.name, made, tokenizer.end_of_text)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in the order of merging.

    Merging a token's own bytes with only the merges that came before it leaves exactly the two parts of the last one.
    """
    merges = []
    for word, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] >= rank:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _byte_characters() -> dict[int, str]:
    """Byte → the character that byte-level BPEs write for it: itself where it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
