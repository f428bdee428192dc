"""OpenAI's GPT-2 weights, as Hugging Face stores them, under our names."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain_xla.config import ModelConfig, RunConfig
from pretrain_xla.errors import UserError

# (d_model, num_layers, num_heads) of each checkpoint.
SHAPES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
VOCAB_SIZE = 50257
# What makes a model compute what GPT-2 computes.
CLASSIC = {
    "activation": "gelu",
    "gated": False,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "post_norm": False,
    "positions": "learned",
    "bias": True,
    "qk_norm": False,
    "query_scale": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embeddings": False,
    "tie_weights": True,
}


def match_vocabulary(config: RunConfig) -> RunConfig:
    """The config with GPT-2's own vocabulary, when it starts from GPT-2 with a padded one (50,304, say).

    GPT-2's logits are around -35 to -80, so a padding row of zeros that counted as a token would dominate the softmax.
    Here padding is a matter of `vocab_multiple`, and is masked.
    """
    if config.train.from_checkpoint not in SHAPES or config.model.vocab_size <= VOCAB_SIZE:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": VOCAB_SIZE})})


def gpt2_config(name: str) -> ModelConfig:
    """The architecture of one of OpenAI's checkpoints, all 1,024 positions of it."""
    d_model, num_layers, num_heads = SHAPES[name]
    shape = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "d_ff": 4 * d_model}
    return ModelConfig.model_validate({"vocab_size": VOCAB_SIZE, "seq_length": 1024, **shape, **CLASSIC})


def load_gpt2(name: str, config: ModelConfig) -> dict[str, Tensor]:
    """Download (or find in the Hub's cache) one of OpenAI's checkpoints, and give it our parameter names.

    Args:
        name: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.
        config: the model that will take the weights; its seq_length may be shorter than 1,024.

    Raises:
        UserError: the model has another shape, or the checkpoint cannot be had.
    """
    theirs = gpt2_config(name)
    for key in ("d_model", "num_layers", "num_heads", "d_ff", *CLASSIC):
        if getattr(config, key) != (value := getattr(theirs, key)):
            raise UserError(
                f"--from-checkpoint {name} has {key}={value}, this model has {getattr(config, key)}: set it"
            )
    if config.seq_length > 1024 or config.vocab_size != VOCAB_SIZE:
        raise UserError(
            f"--from-checkpoint {name} has 1024 positions and {VOCAB_SIZE} tokens; this model wants "
            f"{config.seq_length} and {config.vocab_size}: set --seq-length 1024 or less, and --vocab-size {VOCAB_SIZE}"
        )
    # Imported here: only this door needs the Hub, and its client comes with `datasets`.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(f"openai-community/{name}", "model.safetensors")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"--from-checkpoint {name}: openai-community/{name} cannot be downloaded ({reason}); "
            f"with no network, put it into the Hub's cache ({os.environ.get('HF_HOME', '~/.cache/huggingface')}) beforehand"
        ) from None
    return convert_gpt2(load_file(path), config)


def convert_gpt2(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's GPT-2 tensors under our names.

    GPT-2's linear layers are stored as `[in, out]` (Conv1D) and its query, key and value as one. Rows of padding in the
    embedding are zero; the model masks them. Positions beyond `seq_length` are cut off.

    Args:
        weights: tensors by their name in `model.safetensors`, with or without the `transformer.` prefix.
        config: a model of the same shape.
    """
    source = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    embedding = torch.zeros(config.padded_vocab_size, config.d_model)
    embedding[: source["wte.weight"].shape[0]] = source["wte.weight"]
    state = {"embedding.weight": embedding, "position_embedding.weight": source["wpe.weight"][: config.seq_length]}
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = source[f"ln_f.{kind}"]
        for index in range(config.num_layers):
            ours, theirs = f"blocks.{index}", f"h.{index}"
            projections = _turned(source[f"{theirs}.attn.c_attn.{kind}"]).chunk(3)
            for name, part in zip(("query", "key", "value"), projections, strict=True):
                state[f"{ours}.attention.{name}.{kind}"] = part.contiguous()
            state[f"{ours}.attention.output.{kind}"] = _turned(source[f"{theirs}.attn.c_proj.{kind}"])
            state[f"{ours}.feed_forward.up.{kind}"] = _turned(source[f"{theirs}.mlp.c_fc.{kind}"])
            state[f"{ours}.feed_forward.down.{kind}"] = _turned(source[f"{theirs}.mlp.c_proj.{kind}"])
            state[f"{ours}.attention_norm.{kind}"] = source[f"{theirs}.ln_1.{kind}"]
            state[f"{ours}.feed_forward_norm.{kind}"] = source[f"{theirs}.ln_2.{kind}"]
    return state


def _turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor
