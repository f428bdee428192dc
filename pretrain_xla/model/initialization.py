"""The first values of a model's weights.

Each parameter draws from its own generator, seeded by the run's seed and the parameter's name: the values depend on
neither the order of modules nor the device, the mesh or the vocabulary's padding.
"""

import hashlib
import math

import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.gpt import GPT

RESIDUAL_PROJECTIONS = ("attention.output.weight", "feed_forward.down.weight")
EMBEDDINGS = ("embedding.weight", "position_embedding.weight")
VOCABULARY_TABLES = ("embedding.weight", "head.weight")


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Give every parameter its first value, as `config.init` says; drawn on the CPU, copied to where the parameter is.

    gpt2 is GPT-2's (Radford et al. 2019): normal(0.02), the projections that write to the residual stream divided by
    sqrt(2 * layers). normal is normal(0.02) throughout. fan_in is normal(1 / sqrt(last dimension)), for the embeddings
    too, and zero for the residual projections, so that each block starts as the identity. mup is fan_in with normal(1) for
    untied embeddings and zero for the head, so that neither the residual stream nor the first update of the logits depends on
    the width (Yang et al. 2022, table 8). Always: biases 0, norms the
    identity, padding rows of the vocabulary 0.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(_initial_value(name, parameter.shape, model.config, seed))


def _initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    with torch.device("cpu"):
        if name.endswith("bias"):
            return torch.zeros(shape)
        if name.endswith("norm.weight"):
            return torch.zeros(shape) if _is_zero_centered(config) else torch.ones(shape)
        rows = config.vocab_size if name in VOCABULARY_TABLES else shape[0]
        value = torch.zeros(shape)
        std = _standard_deviation(name, shape, config)
        if std:
            value[:rows].normal_(0.0, std, generator=_generator(name, seed))
        return value


def _is_zero_centered(config: ModelConfig) -> bool:
    return config.norm == "rmsnorm_zero_centered"


def _standard_deviation(name: str, shape: torch.Size, config: ModelConfig) -> float:
    residual = name.endswith(RESIDUAL_PROJECTIONS)
    if config.init == "mup" and not config.tie_weights and name in (*EMBEDDINGS, "head.weight"):
        return 1.0 if name in EMBEDDINGS else 0.0
    if config.init in ("fan_in", "mup"):
        return 0.0 if residual else 1.0 / math.sqrt(shape[-1])
    if config.init == "gpt2" and residual:
        return 0.02 / math.sqrt(2 * config.num_layers)
    return 0.02


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
