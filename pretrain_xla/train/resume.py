"""Where a run starts: at step 0, from its own newest checkpoint (local or on the Hub), or from `--from-checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pretrain_xla.config import ModelConfig, RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop import hub
from pretrain_xla.interop.from_checkpoint import FREE_MODEL_KEYS, check_fits, fit_tensors
from pretrain_xla.interop.load import ModelSource, find_model
from pretrain_xla.interop.tensors import fit_rows
from pretrain_xla.run_folder.checkpoint import MARKER, CheckpointInfo, CheckpointStore, DamagedCheckpoint
from pretrain_xla.run_folder.checkpoint_open import open_checkpoint
from pretrain_xla.run_folder.data_position import has_other_data
from pretrain_xla.run_folder.state_source import Converted
from pretrain_xla.run_folder.tensor_checks import check_finite
from pretrain_xla.run_folder.tokenizer_check import check_same_tokenizer, tokenizer_of_checkpoint, tokenizer_of_run
from pretrain_xla.runtime import Hosts
from pretrain_xla.runtime.shards import Read
from pretrain_xla.tokenizers.fingerprint import TokenizerId
from pretrain_xla.tokenizers.load import known_tokenizers
from pretrain_xla.train.start import Start

LOADS = 3600.0
"""Seconds in which all hosts must have read a checkpoint, when the first has."""


def find_start(
    config: RunConfig, data_fingerprint: str, say: Callable[[str], None], hosts: Hosts | None = None
) -> Start:
    """Decide where the run starts, the same on all hosts. The tensors of a checkpoint are not read yet.

    Raises:
        UserError: the checkpoint is of another model or damaged, `--no-resume` would overwrite a run, or the hosts do not see
            the same checkpoints.
    """
    hosts = hosts or Hosts()
    start = _find_start(config, data_fingerprint, say, hosts)
    _check_same(start, hosts)
    return start


def load_start(
    start: Start,
    state: Mapping[str, Tensor],
    config: RunConfig,
    data_fingerprint: str,
    say: Callable[[str], None],
    load_shards: Callable[[Mapping[str, Tensor], Read], None],
    hosts: Hosts | None = None,
) -> Start:
    """Load the state of a start into a run's tensors; returns the start that it was loaded from.

    That is an older one if the run's newest checkpoint turns out to be damaged: every byte is checked while it is read.

    Args:
        start: of `find_start`; nothing is done if it is that of a new run.
        state, load_shards: as in `Start.load`.
        config, data_fingerprint, say, hosts: as in `find_start`.

    Raises:
        UserError: it cannot be loaded, or it is damaged and there is no other.
    """
    hosts = hosts or Hosts()
    while start.tensors:
        damage: str | None = None
        try:
            start.load(state, load_shards)
        except DamagedCheckpoint as error:
            if not start.replaceable:
                raise
            damage = error.what
        found = list(filter(None, hosts.gather(damage, "the state of a checkpoint", seconds=LOADS)))
        if not found:
            break
        start.release()
        step = _older(start.store, start.step, found[0], say, hosts)
        start = _from_checkpoint(start.store, step, start.store, config, data_fingerprint, say, hosts)
        _check_same(start, hosts)
    return start


def _check_same(start: Start, hosts: Hosts) -> None:
    begins = hosts.gather([start.step, start.digest()], "where the run starts")
    for index, (step, digest) in enumerate(begins):
        if [step, digest] != begins[0]:
            what = f"at step {step}" if step != begins[0][0] else "with another checkpoint"
            raise UserError(
                f"{hosts.name(index)} would start {what}, and {hosts.name(0)} at step {begins[0][0]}: all must see the same "
                "files; put them on a disk that all share, or in a bucket"
            )


def _find_start(config: RunConfig, data_fingerprint: str, say: Callable[[str], None], hosts: Hosts) -> Start:
    root = config.checkpoints_dir
    store = CheckpointStore(root, config.checkpoint.saved_checkpoint_limit, config.checkpoint.keep_interval)
    newest = newest_for_all(store, say, hosts)
    for line in store.skipped(newest):
        if newest is None:
            raise UserError(f"{line}, and there is no other: remove that folder to start over")
        say(line)
    if newest is not None and not config.checkpoint.resume and config.train.mode != "evaluate":
        raise UserError(
            f"--no-resume, but {root} holds checkpoints up to step {newest}: "
            "name another --checkpoints-dir, or remove the step_ folders in it (the run's records are moved aside, and stay)"
        )
    source, step = store, newest
    if config.train.mode != "evaluate" and (pushed := _pushed(config, root, newest)) is not None:
        source, step = open_checkpoint(pushed)
    elif config.train.from_checkpoint is not None and (newest is None or config.train.mode == "evaluate"):
        return _from_model(config, store, data_fingerprint, say)
    if step is None:
        if config.train.mode == "evaluate":
            say("there is no checkpoint: evaluating freshly initialised weights")
        return Start(store)
    return _from_checkpoint(source, step, store, config, data_fingerprint, say, hosts)


def _from_checkpoint(
    source: CheckpointStore,
    step: int,
    store: CheckpointStore,
    config: RunConfig,
    data_fingerprint: str,
    say: Callable[[str], None],
    hosts: Hosts,
) -> Start:
    """The start from a checkpoint of this run, in `store`, or from the Hub; from an older one if its index is damaged."""
    while True:
        info, folder = source.info(step), source.folder(step)
        check_same_model(info, config.model, folder)
        damage: str | None = None
        tensors: Mapping[str, Tensor] = {}
        try:
            tensors = source.stored(step)
        except DamagedCheckpoint as error:
            if source is not store:
                raise
            damage = error.what
        found = list(filter(None, hosts.gather(damage, "the index of a checkpoint", seconds=LOADS)))
        if not found:
            break
        step = _older(store, step, found[0], say, hosts)
    _check_data(info, source, step, data_fingerprint, config, say)
    say(f"continuing from {folder}")
    evaluates = config.train.mode == "evaluate"
    return Start(store, step, tensors, folder, True, evaluates, info, replaceable=source is store)


def _older(store: CheckpointStore, step: int, damage: str, say: Callable[[str], None], hosts: Hosts) -> int:
    """The newest checkpoint but that of `step`, whose tensors are damaged; it is written again when its step comes.

    Raises:
        UserError: there is no other.
    """
    store.condemn(step, damage)
    older = newest_for_all(store, say, hosts)
    if older is None:
        raise UserError(f"{damage}, and there is no other: remove that folder to start over")
    say(f"{damage}, so that checkpoint is skipped for that of step {older}")
    return older


def newest_for_all(store: CheckpointStore, say: Callable[[str], None], hosts: Hosts) -> int | None:
    """Step of the newest checkpoint that every host can read, or None if no host sees one.

    Raises:
        UserError: hosts see checkpoints, but none in common.
    """
    steps_of = hosts.gather(store.steps(), "the checkpoints")
    seen, common = set().union(*steps_of), set.intersection(*map(set, steps_of))
    newest = max(common, default=None)
    if seen == common:
        return newest
    step = max(seen - common)
    (blind, *_) = (index for index, steps in enumerate(steps_of) if step not in steps)
    (sees, *_) = (index for index, steps in enumerate(steps_of) if step in steps)
    what = f"{store.folder(step)} can be read by {hosts.name(sees)}, and not by {hosts.name(blind)}"
    if newest is None:
        raise UserError(
            f"{what}, and there is no other: all must see the same files; put them on a disk that all share, or in a bucket"
        )
    if step > newest:
        say(f"{what}, so that checkpoint is skipped for that of step {newest}")
    return newest


def _pushed(config: RunConfig, root: str, newest: int | None) -> str | None:
    """The newest checkpoint of this run on the Hub, fetched. None means there is none, or the run has its own here."""
    repository = config.checkpoint.hub_repo
    if repository is None or not (steps := hub.steps(repository)):
        return None
    if newest is not None:
        if steps[-1] > newest:  # of another run, or of this run on another host: pushing would remove them
            raise UserError(
                f"{repository} on the Hub holds checkpoints up to step {steps[-1]}, and {root} only up to {newest}: name "
                "another --hub-repo, or another --checkpoints-dir to continue from the Hub"
            )
        return None
    if not config.checkpoint.resume:
        raise UserError(
            f"--no-resume, but {repository} on the Hub holds checkpoints up to step {steps[-1]}: name another --hub-repo"
        )
    return hub.download_checkpoint(repository)


def _from_model(config: RunConfig, store: CheckpointStore, data_fingerprint: str, say: Callable[[str], None]) -> Start:
    """Start from `from_checkpoint`: with the full state of a checkpoint of ours, else (or with `weights_only`) with the
    weights alone.

    Raises:
        UserError: it is of another model, has NaN or infinity, or has already made all steps.
    """
    assert config.train.from_checkpoint is not None
    found = find_model(config.train.from_checkpoint, stated=config.model.model_dump())
    check_fits(found, config.model)
    only = config.train.weights_only and config.train.mode != "evaluate"
    say(f"starting with the weights of {found.where}" if only else f"continuing from {found.where}")
    if found.checkpoint is None:
        _check_tokenizer_beside(found, config)
        return _from_weights(found, config, store)
    source, step = found.checkpoint
    if step >= config.train.train_steps and config.train.mode != "evaluate" and not only:
        raise UserError(
            f"{source.folder(step)} has made {step} steps, and --train-steps is {config.train.train_steps}: raise "
            "--train-steps to continue from there, or add --weights-only to start at step 0 with its weights"
        )
    info = source.info(step)
    _check_data(info, source, step, data_fingerprint, config, say)
    if only:
        return _from_weights(found, config, store)
    tensors = Converted(source.stored(step), lambda name, tensor: fit_rows(name, tensor, config.model))
    return Start(store, step, tensors, found.where, evaluates=config.train.mode == "evaluate", info=info)


def _from_weights(found: ModelSource, config: RunConfig, store: CheckpointStore) -> Start:
    weights = found.read()
    check_finite(weights, found.where)
    tensors = {f"model.{name}": tensor for name, tensor in fit_tensors(weights, config.model).items()}
    return Start(store, tensors=tensors, where=found.where)


def _check_data(
    info: CheckpointInfo,
    source: CheckpointStore,
    step: int,
    data_fingerprint: str,
    config: RunConfig,
    say: Callable[[str], None],
) -> None:
    """Report if the shards are not the checkpoint's, and refuse those of another tokenizer."""
    if info.data == data_fingerprint:
        return
    folder = source.folder(step)
    had = tokenizer_of_checkpoint(source.root, info, config)
    check_same_tokenizer(had, folder, tokenizer_of_run(config), config)
    if has_other_data(info, data_fingerprint) and config.train.mode != "evaluate":
        where = f"those in {config.data.train_dir}, from the start"
        say(f"{folder} was trained on other shards; this run continues on {where}")


def _check_tokenizer_beside(found: ModelSource, config: RunConfig) -> None:
    """The same for an imported model. There, a tokenizer's name without a file is a guess and is not checked."""
    if found.tokenizer is not None and found.tokenizer not in known_tokenizers():
        check_same_tokenizer(TokenizerId(name=found.tokenizer), found.where, tokenizer_of_run(config), config)


def check_same_model(info: CheckpointInfo, model: ModelConfig, folder: str) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UserError: names the first setting that differs.
    """
    saved, wanted = info.config.get("model"), model.model_dump(mode="json")
    if not isinstance(saved, dict):
        raise UserError(f"{folder}/{MARKER} does not say which model it belongs to: name another --checkpoints-dir")
    # An option that is newer than the checkpoint has its default there.
    had = ModelConfig().model_dump(mode="json") | saved
    for key, value in wanted.items():
        if key not in FREE_MODEL_KEYS and had[key] != value:
            raise UserError(
                f"{folder} is a checkpoint of another model: its {key} is {had[key]}, this run's is {value}; "
                "name another --checkpoints-dir, or give the run the model of the checkpoint"
            )
