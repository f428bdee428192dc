"""Where a run begins: new, from its own newest checkpoint, or from another run's (`--from-checkpoint`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pretrain_xla.config import PRETRAINED_MODELS, ModelConfig, RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.train.checkpoint import CheckpointInfo, CheckpointStore, open_checkpoint
from pretrain_xla.train.loss_scale import LossScale

# Settings that may change between a checkpoint and its continuation, because they do not change what the weights mean.
FREE_MODEL_KEYS = {"dropout", "attention", "init"}


@dataclass
class Start:
    """The state that a run begins from. step: updates already made. tensors: name → host tensor, empty for a new run."""

    store: CheckpointStore
    step: int = 0
    valid_loss: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def load_model(self, model: nn.Module) -> None:
        """Put the checkpoint's parameters into a model on the host."""
        state = {n.removeprefix("model."): t for n, t in self.tensors.items() if n.startswith("model.")}
        model.load_state_dict(state, strict=True)

    def optimizer_tensor(self, name: str, parameter: Tensor) -> Tensor:
        """The saved tensor of the optimizer by that name; for a new run, zeros of the parameter's shape (a 0-d step)."""
        saved = self.tensors.get(f"optimizer.{name}")
        if saved is not None:
            return saved
        return torch.zeros((), dtype=torch.int32) if name == "step" else torch.zeros(parameter.shape)

    def load_loss_scale(self, loss_scale: LossScale | None) -> None:
        """Continue with the saved loss scale, where there is one."""
        if loss_scale is not None and "loss_scale.scale" in self.tensors:
            for name, tensor in loss_scale.state.items():
                tensor.copy_(self.tensors[f"loss_scale.{name}"])

    def release(self) -> None:
        """Let the host copies go; the devices have them now."""
        self.tensors = {}


def find_start(config: RunConfig, data_fingerprint: str, say: Callable[[str], None]) -> Start:
    """Decide where the run begins, and read the state.

    Raises:
        UserError: the checkpoint belongs to another model or is damaged, or `--no-resume` would overwrite a run.
    """
    root = config.checkpoints_dir
    store = CheckpointStore(root, config.checkpoint.saved_checkpoint_limit)
    newest = store.newest()
    if newest is not None and not config.checkpoint.resume and not config.train.do_test:
        raise UserError(
            f"--no-resume, but {root} holds checkpoints up to step {newest}: "
            "name another --checkpoints-dir, or remove that folder"
        )
    source, step = store, newest
    named = config.train.from_checkpoint
    if named is not None and (newest is None or config.train.do_test):
        if named in PRETRAINED_MODELS and not os.path.exists(named):
            from pretrain_xla.interop.gpt2 import load_gpt2

            return Start(store, tensors={f"model.{n}": t for n, t in load_gpt2(named, config.model).items()})
        source, step = open_checkpoint(named)
    if step is None:
        if config.train.do_test:
            say("there is no checkpoint: evaluating freshly initialised weights")
        return Start(store)
    info = source.info(step)
    check_same_model(info, config.model, source.folder(step))
    if info.data != data_fingerprint and not config.train.do_test:
        say(
            f"{source.folder(step)} was trained on other shards; this run continues on those in {config.data.train_dir}"
        )
    say(f"continuing from {source.folder(step)}")
    return Start(store, step, info.valid_loss, source.load(step))


def check_same_model(info: CheckpointInfo, model: ModelConfig, folder: str) -> None:
    """Refuse to put one model's weights into another.

    Raises:
        UserError: names the first setting that differs.
    """
    saved, wanted = info.config["model"], model.model_dump(mode="json")
    for key, value in wanted.items():
        if key not in FREE_MODEL_KEYS and saved.get(key) != value:
            raise UserError(
                f"{folder} is a checkpoint of another model: its {key} is {saved.get(key)}, this run's is {value}; "
                "name another --checkpoints-dir, or give the run the model of the checkpoint"
            )
