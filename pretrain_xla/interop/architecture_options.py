"""The options of `ModelConfig` that decide which architecture of `transformers` computes the same model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pretrain_xla.config import ModelConfig


def ANY(value: Any) -> bool:  # noqa: N802 - reads as a constant in the table
    """Any value will do."""
    return True


# The only accepted values of an option that a row of the table does not list.
PLAIN: dict[str, tuple[Any, ...] | Callable[[Any], bool]] = {
    "norm": ("rmsnorm",),
    "positions": ("rotary",),
    "gated": (True,),
    "bias": (False,),
    "post_norm": (False,),
    "qk_norm": (False,),
    "query_scale": (None,),
    "attention_softcap": (None,),
    "logit_softcap": (None,),
    "scale_embeddings": (False,),
    "embedding_norm": (False,),
    "num_kv_heads": (None,),
    "head_dim": (None,),
    "heads_dim": ANY,
    "num_heads": (None,),
}


def architecture_options(config: ModelConfig) -> dict[str, Any]:
    """Option → value, for each key of `PLAIN`; None where the value is the one that every architecture implies."""
    values = {name: getattr(config, name) for name in PLAIN}
    if config.query_scale is not None and math.isclose(config.query_scale, config.heads_dim**-0.5, rel_tol=1e-9):
        values["query_scale"] = None
    if config.heads_dim * config.num_heads == config.d_model:
        values["head_dim"] = None
    if config.kv_heads == config.num_heads:
        values["num_kv_heads"] = None
    if config.d_model % config.num_heads == 0:
        values["num_heads"] = None  # most architectures require it, even where head_dim is set
    return values


def allowed(accepted: Any, value: Any) -> bool:
    """Whether an entry of the table, a tuple of values or a predicate, accepts the value."""
    return bool(accepted(value)) if callable(accepted) else value in accepted
