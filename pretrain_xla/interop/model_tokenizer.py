"""Find the tokenizer in a model's folder, or report why it cannot be used.

Supported are `tokenizer.json`, our own `bitbpe.json`, SentencePiece models, and GPT-2's vocabulary with merges under either of
its names. Other formats are recognised by file name, so that a model with an unsupported tokenizer gets none instead of a wrong
one.
"""

from __future__ import annotations

from collections.abc import Callable

from pretrain_xla.errors import UserError
from pretrain_xla.tokenizers.tokenizer import BITBPE_FILE, SPECIALS_FILE, TOKENIZER_FILE
from pretrain_xla.tokenizers.vocab_merges import VOCABULARIES
from pretrain_xla.untrusted import parse_object

GPT2_VOCABULARY = 50257
CONFIG_FILE = "tokenizer_config.json"
WHOLE = (BITBPE_FILE, TOKENIZER_FILE)
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
# Classes of transformers, without "Fast", that give exactly the ids of these files; others shift ids or change the text.
SENTENCEPIECE_CLASSES = {"Llama", "T5", "Gemma", "Reformer", "BertGeneration", "BigBird", "CodeLlama"}
BPE_CLASSES = {"GPT2", "Roberta", "Bart", "CodeGen", "GPTNeoX"}
# Generic classes, which transformers writes for a tokenizer of any kind.
ANY_CLASSES = {"", "PreTrained", "TokenizersBackend"}
UNUSABLE = (
    *VOCABULARIES,
    *VOCABULARIES.values(),
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spm.model",
    "bpe.codes",
    "tekken.json",
    "qwen.tiktoken",
    "tokenizer.pkl",
    "meta.pkl",
    "tokenizer.bin",
    CONFIG_FILE,
    SPECIALS_FILE,
    "added_tokens.json",
)

Find = Callable[[str], str | None]


def find_model_tokenizer(find: Find, vocab_size: int, where: str) -> tuple[str | None, tuple[str, ...]]:
    """Its name or path for `load_tokenizer`, or None; and a note if it was guessed or cannot be used.

    Args:
        find: file name → local path, or None if there is no such file next to the weights.
        vocab_size: ids of the model.
        where: the model, for messages.
    """
    own = next(filter(None, map(find, WHOLE)), None)
    if own is not None:
        for name in (SPECIALS_FILE, CONFIG_FILE):
            find(name)  # from the Hub: downloads them next to it, for the end-of-text token that they name
        return own, ()
    kinds = [(name, SENTENCEPIECE_CLASSES) for name in SENTENCEPIECE]
    kinds += [(name, BPE_CLASSES) for name, merges in VOCABULARIES.items() if find(merges)]
    for name, classes in kinds:
        path = find(name)
        if path is None:
            continue
        maker = _class_of(find)
        if maker not in classes | ANY_CLASSES:
            return None, (f"{where}: its {name} is read by {maker}Tokenizer alone, so it is left without a tokenizer",)
        for other in (SPECIALS_FILE, CONFIG_FILE, "added_tokens.json"):
            find(other)
        return path, ()
    unusable = next((name for name in UNUSABLE if find(name)), None)
    if unusable is not None:
        return None, (f"{where}: it has a tokenizer that cannot be used here ({unusable}), so it is left without one",)
    if vocab_size != GPT2_VOCABULARY:
        return None, ()
    words = "it came with no tokenizer, and has as many ids as GPT-2: GPT-2's is taken for it, which is a guess"
    return "gpt2", (f"{where}: {words} (--tokenizer overrides it)",)


def _class_of(find: Find) -> str:
    """The class of transformers that the folder names for its tokenizer, without `Tokenizer` and `Fast`; "" if none."""
    path = find(CONFIG_FILE)
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            name = parse_object(file.read(), path).get("tokenizer_class")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return str(name or "").removesuffix("Fast").removesuffix("Tokenizer")
