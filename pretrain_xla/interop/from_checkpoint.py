"""Initialise a run from a checkpoint: its architecture becomes the run's, and its tensors are fitted to the run's shapes.

Options that the user did not set come from the checkpoint. Those that they did set must agree with it. These may differ: fewer
positions, another padding of the vocabulary, and settings that do not change what the weights mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain_xla.config import ModelConfig, RunConfig, build_config
from pretrain_xla.data.manifest import MANIFEST, dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.interop.load import ModelSource, find_model
from pretrain_xla.interop.tensors import fit_rows
from pretrain_xla.model import parameter_count
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer

# Settings that may change between a checkpoint and its continuation, because they do not change what the weights mean.
FREE_MODEL_KEYS = {"dropout", "attention", "init"}
# Vocabularies are padded to a multiple of at most this: a table larger by less than it may be the same vocabulary.
USUAL_PADDING = 128


def resolve_architecture(tree: Mapping[str, Any], stated: frozenset[str], where: str) -> tuple[RunConfig, list[str]]:
    """The config of a run, with the architecture of the checkpoint that it is initialised from, if any.

    Args:
        tree: section → leaf → value, from flags, file and defaults. It is validated with the checkpoint's architecture in
            place, because settings that are valid with the defaults may be invalid with the checkpoint, and vice versa.
        stated: the leaves that the user set; all others of `model` come from the checkpoint.
        where: the origin of the values, for messages.

    Returns:
        The config, and a note on each setting that was taken or changed.

    Raises:
        UserError: a stated leaf contradicts the checkpoint, there is no such checkpoint, or the config is invalid with it.
    """
    source = tree["train"]["from_checkpoint"]
    if source is None:
        return resolve_vocabulary(tree, stated, where)
    found = find_model(source, stated={leaf: tree["model"][leaf] for leaf in stated & tree["model"].keys()})
    own = {key: value for key, value in tree["model"].items() if key in FREE_MODEL_KEYS | stated}
    model = {key: value for key, value in found.config.model_dump().items() if key not in FREE_MODEL_KEYS} | own
    notes = [f"the model is that of {found.where}: {parameter_count(found.config):,} parameters", *found.notes]
    if model["vocab_size"] > found.config.vocab_size:
        # Its logits for real tokens may lie far below 0, where a row of zeros that counts as a token would drown them.
        notes.append(f"vocab_size {model['vocab_size']} -> {found.config.vocab_size}: the rest is padding")
        model["vocab_size"] = found.config.vocab_size
    config = build_config({**tree, "model": model}, where)
    check_fits(found, config.model)
    return config, notes


def resolve_vocabulary(tree: Mapping[str, Any], stated: frozenset[str], where: str) -> tuple[RunConfig, list[str]]:
    """The config of a run that is new or resumed, with the vocabulary size of its data unless the user set one.

    A resumed run keeps the size of its checkpoint, which may be larger. Arguments and errors are those of
    `resolve_architecture`.
    """
    model, folders = tree["model"], [tree["data"][key] for key in ("train_dir", "valid_dir")]
    try:
        info = None if "vocab_size" in stated else next(filter(None, map(dataset_info, folders)), None)
    except UserError:  # reported when the data is opened; preflight needs no data, and may have no network
        info = None
    if info is None or info.vocab_size == model["vocab_size"]:
        return build_config(dict(tree), where), []
    size, source = info.vocab_size, f"{info.root}/{MANIFEST}"
    folder = build_config({key: tree[key] for key in ("logging", "checkpoint")}, where).checkpoints_dir
    store = CheckpointStore(folder, limit=1)
    newest = store.newest()
    saved = store.info(newest).config.get("model") if newest is not None else None
    if isinstance(saved, dict) and isinstance(saved.get("vocab_size"), int):
        size, source = saved["vocab_size"], f"the run's checkpoint in {folder}"
    made = build_config({**tree, "model": {**model, "vocab_size": size}}, where)
    return made, [f"vocab_size {size} is that of {source} (--vocab-size overrides it)"]


def resolve_tokenizer(config: RunConfig, stated: frozenset[str]) -> tuple[RunConfig, list[str]]:
    """The config with the tokenizer of `from_checkpoint`, if neither the user nor the shards name one; and a note on it.

    Raises:
        UserError: there is no such checkpoint, or the manifest of the shards is damaged.
    """
    if config.train.from_checkpoint is None or "tokenizer" in stated or dataset_info(config.data.train_dir) is not None:
        return config, []
    found = find_model(config.train.from_checkpoint, stated=config.model.model_dump())
    name, notes = usable_tokenizer(found)
    if name is None:
        return config, [*notes, f"neither {found.where} nor the shards name a tokenizer: gpt2 is taken for text"]
    if name == "gpt2":
        return config, []
    data = config.data.model_copy(update={"tokenizer": name})
    return config.model_copy(update={"data": data}), [f"the shards name no tokenizer: that of {found.where} is taken"]


def usable_tokenizer(found: ModelSource) -> tuple[str | None, list[str]]:
    """The tokenizer that a model came with; None, with a note, if it cannot be loaded here."""
    if found.tokenizer is not None and found.tokenizer not in known_tokenizers():
        try:
            load_tokenizer(found.tokenizer)
        except UserError as error:
            return None, [f"its tokenizer is left out: {error}"]
    return found.tokenizer, []


def check_fits(found: ModelSource, wanted: ModelConfig) -> None:
    """Refuse to put one model's weights into another.

    Raises:
        UserError: names the first setting that differs.
    """
    saved, may_differ = found.config, {*FREE_MODEL_KEYS, "vocab_multiple", *found.guessed}
    if wanted.seq_length <= saved.seq_length or saved.positions != "learned":
        may_differ.add("seq_length")
    if wanted.vocab_size <= saved.vocab_size < wanted.vocab_size + USUAL_PADDING:
        may_differ.add("vocab_size")
    had, has = saved.model_dump(mode="json"), wanted.model_dump(mode="json")
    for key, value in has.items():
        if key not in may_differ and had[key] != value:
            raise UserError(mismatch_message(found.where, key, had[key], value))


def mismatch_message(where: str, key: str, had: Any, wanted: Any) -> str:
    """The message for a checkpoint whose architecture differs."""
    return (
        f"{where} is a checkpoint of another model: its {key} is {had}, this run's is {wanted}; leave {key} out to take it "
        "from the checkpoint, or name another checkpoint"
    )


def fit_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors, parameters and moments, cut or padded to the rows that a model of this config has."""
    return {name: fit_rows(name, tensor, config) for name, tensor in tensors.items()}
