"""Conversion of tensors between our names and those of `transformers`: renamed, transposed, fused and split, so it is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop.layouts import Layout
from pretrain_xla.model import GPT

# Prefixes that DDP and torch.compile add to every name.
PREFIXES = ("_orig_mod.", "module.")
TABLES = ("embedding.weight", "head.weight")
# Constants that older versions of transformers saved with the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name → shape of each of our parameters."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def to_hugging_face(tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Our tensors by Hugging Face names. Rows of padding are cropped, and biases that our model lacks are zero."""
    source = {name: tensor.detach() for name, tensor in tensors.items()}
    for name in TABLES:
        if name in source:
            source[name] = source[name][: config.vocab_size].clone()  # a view would be saved with all its rows
    if config.positions == "none" and "position_embedding" in layout.outer:
        source["position_embedding.weight"] = torch.zeros(config.seq_length, config.d_model)
    for module in _biased(config, layout):
        weight = source[f"{module}.weight"]
        source.setdefault(f"{module}.bias", torch.zeros(weight.shape[0]))
    result: dict[str, Tensor] = {}
    for theirs, ours in _names(source, config, layout).items():
        parts = [source[name] for name in ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[theirs] = _transposed(tensor, layout, theirs)
    return result


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout, where: str
) -> dict[str, Tensor]:
    """Hugging Face tensors by our names, in fp32. The embedding is padded with rows of zeros, which are masked.

    A longer table of learned positions is cut to `seq_length`. A missing bias is zero; a bias that our model lacks must be
    zero.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in our model.
    """
    rest = {name: tensor for name, tensor in strip_prefixes(tensors, layout).items() if not name.endswith(CONSTANTS)}
    _refuse_quantised(rest, where)
    expected = shapes(config)
    table, head_name = f"{layout.outer['embedding']}.weight", f"{layout.outer['head']}.weight"
    if config.tie_weights and table not in rest and head_name in rest:
        rest[table] = rest.pop(head_name)  # tied, and saved under the name of the head
    result: dict[str, Tensor] = {}
    for theirs, ours in _names(expected, config, layout).items():
        tensor = rest.pop(theirs, None)
        if tensor is None and theirs.endswith(".bias"):
            result |= {name: torch.zeros(expected[name]) for name in ours}
            continue
        if tensor is None:
            raise UserError(f"{where}: tensor {theirs!r} is missing")
        tensor = _transposed(tensor, layout, theirs)
        sizes = [_rows(name, tensor, config, expected) for name in ours]
        wanted = (sum(sizes), *expected[ours[0]][1:])
        if tuple(tensor.shape) != wanted:
            raise UserError(f"{where}: tensor {theirs!r} is {_shape(tensor.shape)}, its config says {_shape(wanted)}")
        for name, part in zip(ours, tensor.split(sizes), strict=True):
            result[name] = fit_rows(name, part, config).float().contiguous()
    head = rest.pop(f"{layout.outer['head']}.weight", None) if config.tie_weights else None
    if head is not None and not torch.equal(head.float(), result["embedding.weight"][: len(head)]):
        raise UserError(f"{where}: has a head of its own, and its config says that the embedding is the head")
    for name, tensor in rest.items():
        if tensor.count_nonzero():
            why = f", whose {config.norm} has no bias" if "norm" in name and name.endswith(".bias") else ""
            if name.endswith(".bias") and not config.bias:
                why += "; was it exported without biases and trained elsewhere since, delete `pretrain_xla` in its config.json"
            raise UserError(f"{where}: tensor {name!r} has no place in the model that its config describes{why}")
    return result


def _refuse_quantised(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse integers and one-byte floats: they are quantised, and meaningless without their scales.

    Raises:
        UserError: one was found.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: tensor {name!r} holds {kind}: it is quantised; name the model that it was made from"
            )


def _rows(name: str, tensor: Tensor, config: ModelConfig, expected: Mapping[str, torch.Size]) -> int:
    """Expected rows of a Hugging Face tensor: a token table has no padding, and a position table may be longer."""
    if name in TABLES:
        return config.vocab_size
    return max(expected[name][0], len(tensor)) if name == "position_embedding.weight" else expected[name][0]


def fit_rows(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A token or position table, cut or padded to the model's size; any other tensor unchanged."""
    if name.endswith("position_embedding.weight"):
        return tensor[: config.seq_length]
    if not name.endswith(TABLES):
        return tensor
    wanted = config.padded_vocab_size
    missing = tensor.new_zeros(max(0, wanted - len(tensor)), tensor.shape[1])
    return torch.cat((tensor, missing))[:wanted]


def strip_prefixes(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors without the prefixes of wrappers, and with the architecture's own prefix if it was left out."""
    result = dict(tensors)
    for prefix in PREFIXES * 2:
        if result and all(name.startswith(prefix) for name in result):
            result = {name.removeprefix(prefix): tensor for name, tensor in result.items()}
    own = layout.layers.split(".")[0] + "."
    if any(name.startswith(own) for name in result):
        return result
    head = layout.outer["head"]
    return {name if name.startswith(head) else own + name: tensor for name, tensor in result.items()}


def _names(ours: Mapping[str, object], config: ModelConfig, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Hugging Face name → the names of ours that it holds."""
    result: dict[str, tuple[str, ...]] = {}
    for name in ours:
        module, leaf = name.rsplit(".", 1)
        if not module.startswith("blocks."):
            result[f"{layout.outer[module]}.{leaf}"] = (name,)
            continue
        _, index, inner = module.split(".", 2)
        theirs = layout.inner[inner]
        parts = tuple(f"blocks.{index}.{part}.{leaf}" for part in layout.fused.get(theirs, (inner,)))
        result[f"{layout.layers}.{index}.{theirs}.{leaf}"] = parts
    return result


def _biased(config: ModelConfig, layout: Layout) -> list[str]:
    """Our modules that must have a bias in this layout."""
    outer = [module for module in layout.always_biased if module in layout.outer]
    inner = [module for module in layout.always_biased if module in layout.inner]
    return outer + [f"blocks.{index}.{module}" for index in range(config.num_layers) for module in inner]


def _transposed(tensor: Tensor, layout: Layout, theirs: str) -> Tensor:
    """A layer's matrix, transposed if this layout stores it as [in, out]."""
    turned = layout.transposed and tensor.dim() == 2 and theirs.startswith(layout.layers)
    return tensor.t().contiguous() if turned else tensor


def _shape(shape: torch.Size | tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
