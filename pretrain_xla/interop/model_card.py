"""The model card of an export: what a reader needs to use the model, and only what is known."""

from __future__ import annotations

import math
from typing import Any

from pretrain_xla.config import ModelConfig, build_config
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.interop.families import Family
from pretrain_xla.interop.load import LoadedModel
from pretrain_xla.model import parameter_count
from pretrain_xla.redact import redacted
from pretrain_xla.run_folder.data_position import tokens_seen
from pretrain_xla.run_folder.report import perplexity, shown

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pretrain_xla
---

# {title}

A decoder-only transformer with {parameters:,} parameters, {provenance} with pretrain_xla. It computes what `{architecture}` of
`transformers` does, so that it opens there with no custom code.

```python
{usage}
```

## The model

| | |
|---|---|
{model_rows}

## Training

{training}

It is a base model: it continues text, follows no instructions, and repeats what its data holds, also what is wrong or unkind.
"""


USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")"""

USAGE_WITHOUT_TOKENIZER = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}")  # token ids in, logits out: it has no tokenizer"""


def model_card(loaded: LoadedModel, family: Family, title: str, *, has_tokenizer: bool) -> str:
    """The text of `README.md`. It may be pushed, so passwords and tokens in URLs are removed."""
    config, trained = loaded.config, loaded.info is not None and loaded.info.step > 0
    card = CARD.format(
        title=title,
        usage=(USAGE if has_tokenizer else USAGE_WITHOUT_TOKENIZER).format(title=title),
        parameters=parameter_count(config),
        provenance="trained" if trained else "converted",
        architecture=family.architecture,
        model_rows="\n".join(f"| {name} | {value} |" for name, value in _rows(config)),
        training=_training(loaded),
    )
    return redacted(card)


def _rows(config: ModelConfig) -> list[tuple[str, Any]]:
    heads = f"{config.num_heads} of width {config.heads_dim}"
    if config.kv_heads != config.num_heads:
        heads += f", {config.kv_heads} for keys and values"
    return [
        ("layers", config.num_layers),
        ("width", config.d_model),
        ("heads", heads),
        ("feed-forward", f"{config.d_ff}, {config.activation}{', gated' if config.gated else ''}"),
        ("normalisation", f"{config.norm}{', before and after' if config.post_norm else ''}"),
        ("positions", config.positions),
        ("context", f"{config.seq_length} tokens"),
        ("vocabulary", f"{config.vocab_size} tokens"),
    ]


def _training(loaded: LoadedModel) -> str:
    """What is known of the training."""
    if loaded.info is None or loaded.info.step == 0:
        return f"Converted from {loaded.where}; see there for how it was trained."
    run = build_config(loaded.info.config, loaded.where)
    tokens = tokens_seen(loaded.info)
    steps = f"{loaded.info.step:,} steps"
    if tokens == loaded.info.step * run.tokens_per_step:
        lines = [f"- {steps} of {run.tokens_per_step:,} tokens, {tokens:,} in all"]
    else:  # the batch size was changed during training
        lines = [f"- {steps}, {tokens:,} tokens in all"]
    lines.append(f"- Data: {_data(run.data.train_dir)}")
    lines.append(f"- Tokenizer: {_tokenizer_words(loaded.tokenizer)}")
    loss = loaded.info.valid_loss
    if loss is not None and math.isfinite(loss):
        lines.append(f"- Validation loss {loss:.4f} nats per token (perplexity {shown(perplexity(loss), 2)})")
    return "\n".join(lines)


def _data(train_dir: str) -> str:
    """The source that the shards were prepared from, if their manifest is still there."""
    try:
        info = dataset_info(train_dir)
    except UserError:
        info = None  # the export does not need the data
    return f"{info.recipe.source} (`{train_dir}`)" if info else f"`{train_dir}`"


def _tokenizer_words(name: str | None) -> str:
    if name is None:
        return "unknown"
    return "a `tokenizer.json` of its own" if "/" in name else f"`{name}`"
