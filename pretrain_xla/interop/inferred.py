"""Options that the tensors of an old checkpoint do not show: the number of heads, and the form of GELU.

Both change what the model computes and neither changes a shape, so a wrong value runs without an error and gives worse results.
The number of heads is never guessed from the width: a model trained with 3 heads and run with 1 still generates, and is right
half as often. The two GELUs differ by a thousandth; if the file does not state which, it is guessed from the code that wrote
it, and the guess is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.interop.config_keys import OUR_ACTIVATIONS

HEADS_KEYS = ("n_head", "num_heads", "num_attention_heads", "n_heads", "num_head", "heads")
# (layers, width) → heads of GPT-2 as published, in its four sizes.
PUBLISHED = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}
PUBLISHED_POSITIONS, PUBLISHED_IDS = 1024, range(50257, 50305)  # nanoGPT adds rows of padding
# "gelu" alone is ambiguous: trainers use it for both forms.
ACTIVATION_KEYS = ("activation_function", "activation", "hidden_act", "act")
PLAIN_GELU = ("gelu", "GELU")


def infer_heads(
    tensors: Mapping[str, Tensor], shape: Mapping[str, Any], stated: Mapping[str, Any], path: str
) -> tuple[int, str | None]:
    """The number of heads, and a note if it is assumed to be that of a published GPT-2.

    Args:
        tensors: by GPT-2's names.
        shape: the settings that were saved with them.
        stated: options that the user set.
        path: the file, for messages.

    Raises:
        UserError: it is not stated, and the shapes are not those of a published GPT-2.
    """
    said = next((shape[key] for key in HEADS_KEYS if isinstance(shape.get(key), int)), None)
    if said is not None:
        return int(said), None
    if "num_heads" in stated:
        return int(stated["num_heads"]), None
    ids, width = tensors["transformer.wte.weight"].shape
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    published = PUBLISHED.get((layers, width))
    if published and len(tensors["transformer.wpe.weight"]) == PUBLISHED_POSITIONS and ids in PUBLISHED_IDS:
        return published, (
            f"it does not say how many heads it has: {published} are taken, as GPT-2 of this size has (--num-heads says "
            "otherwise)"
        )
    raise UserError(
        f"{path}: it does not say how many heads it has, and its tensors do not show it: set it with --num-heads "
        f"(a divisor of its width, {width}), for `python -m pretrain_xla import` as well"
    )


def infer_activation(
    shape: Mapping[str, Any], stated: Mapping[str, Any], *, transposed: bool, masked: bool
) -> tuple[str, str | None]:
    """Our name of the activation, and a note if it is a guess.

    Args:
        shape: the settings that were saved with the tensors.
        stated: options that the user set.
        transposed: whether matrices are stored as [in, out], as in OpenAI's code.
        masked: whether attention masks were saved, as by code from before PyTorch 2.
    """
    said = next((shape[key] for key in ACTIVATION_KEYS if isinstance(shape.get(key), str)), None)
    if said in OUR_ACTIVATIONS and said not in PLAIN_GELU:
        return OUR_ACTIVATIONS[said], None
    if said == "gelu" and "activation_function" in shape:  # transformers' name of the exact form
        return OUR_ACTIVATIONS[said], None
    if "activation" in stated:
        return str(stated["activation"]), None
    if said is not None and said not in PLAIN_GELU:
        raise UserError(f"activation {said!r} is not supported: name one with --activation")
    if transposed:
        return "gelu", _guess("gelu", "its matrices are stored as OpenAI's code has them")
    if masked:
        return "gelu", _guess("gelu", "the masks of attention were saved with it, as by minGPT and early nanoGPT")
    if "n_layer" in shape and "bias" not in shape:
        return "gelu", _guess("gelu", "its settings are those of build-nanogpt, minGPT or early nanoGPT")
    return "gelu_exact", _guess("gelu_exact", "as nanoGPT has it since June 2023")


def _guess(taken: str, why: str) -> str:
    form, other = ("tanh form", "gelu_exact") if taken == "gelu" else ("exact form", "gelu")
    return f"it does not say which GELU it was trained with: the {form} is taken ({why}; --activation {other} says otherwise)"
