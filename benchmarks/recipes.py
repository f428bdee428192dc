"""The contestants of `tokens_to_loss.py`: recipes for small models, as trees of config sections.

baseline: nanoGPT's: GPT-2's architecture and AdamW, with the learning rate, warm-up, decay and betas of its example for small
    models (config/train_shakespeare_char.py: 1e-3, 2% warm-up, cosine to a tenth, betas 0.9 and 0.99). No dropout: no text is
    seen twice.
baseline_tuned: the same at the best learning rate.
modern: this package's modern architecture with AdamW at the best learning rate.
ours: docs/recipe.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

Tree = dict[str, dict[str, Any]]

CONTESTANTS = ("baseline", "baseline_tuned", "modern", "ours")
SEQUENCES, SEQ_LENGTH, VOCAB_SIZE = 16, 256, 4096
TOKENS_PER_STEP = SEQUENCES * SEQ_LENGTH


@dataclass(frozen=True)
class Size:
    """Shapes and budget of a size.

    Attributes:
        d_ff, gated_d_ff: feed-forward widths without and with a gate, of about as many parameters.
        steps: budget of all recipes but `ours`.
        budgets: of `ours`, as shares of it.
        targets: largest shares of the tokens of `baseline`, `baseline_tuned` and `modern` that `ours` may need.
        learning_rates: the best of those tried on seed 0 (docs/LOG.md); nanoGPT's own for `baseline`.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    gated_d_ff: int
    steps: int
    budgets: tuple[float, ...]
    targets: tuple[float, float, float]
    learning_rates: dict[str, float]


SIZES = {
    "2M": Size(
        *(192, 4, 3, 768, 512),
        steps=400,
        budgets=(0.05, 0.1, 0.2, 0.3),
        targets=(0.2, 0.3, 0.5),
        learning_rates={"baseline": 1e-3, "baseline_tuned": 1e-3, "modern": 2e-3, "ours": 0.02},
    ),
    "8M": Size(
        *(320, 6, 5, 1280, 864),
        steps=300,
        budgets=(0.08, 0.15, 0.25, 0.35),
        targets=(0.25, 0.35, 0.55),
        learning_rates={"baseline": 1e-3, "baseline_tuned": 1e-3, "modern": 1e-3, "ours": 0.02},
    ),
}

MODERN = {"activation": "silu", "gated": True, "norm": "rmsnorm", "positions": "rotary", "bias": False, "qk_norm": True}
OURS = {
    "optim_type": "muon",
    "muon_scale": "original",
    "base_d_model": 192,
    "embedding_learning_rate": 0.3,
    "head_learning_rate": 0.008,
    "scalar_learning_rate": 0.008,
    "betas": [0.8, 0.95],
    "decay_method": "wsd",
    "warmup_steps": 0,
    "cooldown_fraction": 0.6,
    "min_lr_fraction": 0.0,
}


def recipe(contestant: str, size: Size, steps: int, learning_rate: float | None = None) -> Tree:
    """Config of a contestant that trains for so many steps. learning_rate: None means the size's."""
    tree = _base(size, steps)
    tree["optim"]["learning_rate"] = learning_rate or size.learning_rates[contestant]
    if contestant in ("modern", "ours"):
        tree["model"] |= MODERN | {"d_ff": size.gated_d_ff}
    if contestant == "ours":
        tree["model"] |= {"init": "mup", "tie_weights": False, "embedding_norm": True}
        tree["optim"] |= OURS | {"muon_momentum_warmup": min(300, steps // 2)}
        return tree
    tree["optim"] |= {
        "min_lr_fraction": 0.1,
        "betas": [0.9, 0.95 if contestant == "modern" else 0.99],
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "decay_method": "cosine",
        "warmup_steps": max(steps // 50, 1),
    }
    return tree


ABLATIONS: dict[str, Tree] = {
    "muon": {"optim": {"optim_type": "adamw", "learning_rate": 0.008}},
    "polar_express": {"optim": {"muon_polynomials": "quintic"}},
    "momentum_warmup": {"optim": {"muon_momentum_warmup": 0}},
    "betas": {"optim": {"betas": [0.9, 0.95]}},
    "long_cooldown": {"optim": {"cooldown_fraction": 0.2}},
    "no_warmup": {"optim": {"warmup_steps": 8}},
    "zero_init": {"model": {"init": "gpt2"}},
    "untied_head": {"model": {"tie_weights": True}, "optim": {"embedding_learning_rate": 0.008}},
    "embedding_norm": {"model": {"embedding_norm": False}},
    "embedding_rate": {"optim": {"embedding_learning_rate": 0.008}},
}
"""Name of an ingredient of `ours` → what the config has without it."""


def ablated(ingredient: str, size: Size, steps: int) -> Tree:
    """`ours` without one ingredient."""
    tree = copy.deepcopy(recipe("ours", size, steps))
    for section, leaves in ABLATIONS[ingredient].items():
        tree[section] |= leaves
    return tree


def _base(size: Size, steps: int) -> Tree:
    return {
        "model": {
            "vocab_size": VOCAB_SIZE,
            "seq_length": SEQ_LENGTH,
            "d_model": size.d_model,
            "num_layers": size.num_layers,
            "num_heads": size.num_heads,
            "d_ff": size.d_ff,
            "tie_weights": True,
        },
        "optim": {"decay_steps": steps},
        "train": {
            "train_batch_size": SEQUENCES,
            "eval_batch_size": SEQUENCES,
            "train_steps": steps,
            "valid_steps": 16,
            "valid_interval": 10**6,
            "mixed_precision": "bf16",
            "compile": True,
        },
        "checkpoint": {"save_interval": 10**6},
        "logging": {"log_interval": 10, "tensorboard": False},
    }
