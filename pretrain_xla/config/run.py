"""The tree of all settings, and its construction from a nested dict."""

from __future__ import annotations

import difflib
import os
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from pretrain_xla.config.data import DataConfig, EvaluationConfig
from pretrain_xla.config.model import ModelConfig
from pretrain_xla.config.old_settings import SWITCHES, translate
from pretrain_xla.config.output import CheckpointConfig, LoggingConfig, WandbConfig
from pretrain_xla.config.parallel import ParallelConfig
from pretrain_xla.config.section import Section
from pretrain_xla.config.training import OptimConfig, TrainConfig
from pretrain_xla.errors import UserError


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step, over all devices."""
        return self.train.train_batch_size * self.train.gradient_accum_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, over all devices."""
        return self.sequences_per_step * self.model.seq_length

    @property
    def run_dir(self) -> str:
        """Folder of the run's files."""
        return self.logging.run_dir or self.checkpoint.checkpoints_dir

    @property
    def checkpoints_dir(self) -> str:
        """Folder of checkpoints, inside `run_dir` if that is set and the path is relative."""
        if self.logging.run_dir is None or "://" in self.checkpoint.checkpoints_dir:
            return self.checkpoint.checkpoints_dir
        return os.path.join(self.logging.run_dir, self.checkpoint.checkpoints_dir)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        vocab_size, end_of_text = self.model.vocab_size, self.data.end_of_text
        named = [("loss_ignore_tokens", token) for token in self.train.loss_ignore_tokens]
        for key, token in named if end_of_text is None else [*named, ("end_of_text", end_of_text)]:
            if token >= vocab_size:
                raise ValueError(f"{key}={token} is not below vocab_size={vocab_size}: give a valid token id")
        if self.train.weights_only and self.train.from_checkpoint is None:
            raise ValueError("weights_only=True needs from_checkpoint, which is not set: set it")
        if self.train.mixed_precision == "fp16" and self.parallel.runtime == "xla":
            raise ValueError("mixed_precision=fp16 needs CUDA (runtime=torch): XLA devices compute in bf16")
        recomputes = self.train.rematerialization != "none" or self.train.scan_layers
        if self.model.dropout and recomputes and self.parallel.runtime == "xla":
            key = "scan_layers" if self.train.scan_layers else "rematerialization"
            raise ValueError(
                f"dropout={self.model.dropout} with {key}={getattr(self.train, key)}: a recomputed block would draw "
                f"another dropout mask, and the gradients would be wrong: set dropout=0, or leave out {key}"
            )
        if self.checkpoint.hub_repo and "://" in self.checkpoints_dir:
            raise ValueError(
                f"hub_repo={self.checkpoint.hub_repo} needs a local checkpoints_dir, but checkpoints_dir="
                f"{self.checkpoints_dir} is a URL: set a local folder, or leave out hub_repo"
            )
        if "://" in self.run_dir and self.train.mode != "evaluate":
            key = "run_dir" if self.logging.run_dir else "checkpoints_dir"
            raise ValueError(
                f"{key}={self.run_dir} is a URL, but metrics can only be written to a local disk: set a local --run-dir "
                "(checkpoints_dir may be a URL)"
            )
        return self


def _leaves(section: type[BaseModel]) -> dict[str, str]:
    """Leaf name → section name, for every leaf of the tree."""
    return {
        leaf: name
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for leaf in field.annotation.model_fields
    }


LEAVES = _leaves(RunConfig)
"""Leaf name → section name."""

SECTION_OF_KEY = LEAVES | {name: switch.section for name, switch in SWITCHES.items()}
"""The same, with the old keys that a file may contain."""


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(sorted(known))}"


def _one_line(error: ValidationError, where: str) -> str:
    """The first error that pydantic found, as one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parents = first["loc"][:-1]
        fields: Any = RunConfig.model_fields if not parents else RunConfig.model_fields[str(parents[0])].annotation
        known = list(fields if not parents else fields.model_fields)
        last = str(first["loc"][-1])
        if last in SECTION_OF_KEY:
            return f"{where}: key {key!r} is in the wrong place: it belongs under {SECTION_OF_KEY[last]!r}"
        return f"{where}: unknown key {key!r}{_nearest(last, known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {key}={_shown(first['input'])}: {message}"


def _shown(value: Any) -> str:
    """A value as the user wrote it, shortened: a YAML file of ten lines can hold a list of a billion."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 200
    shortener.maxlevel = 2
    try:
        return shortener.repr(value)
    except ValueError:
        return "(a number with thousands of digits)"


def build_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validate a nested dict into a `RunConfig`.

    Args:
        tree: section name → leaf name → value. Missing sections and leaves take their defaults, and old ones are translated.
        where: origin of the values, for the error message.

    Raises:
        UserError: unknown key, bad value or impossible combination.
    """
    try:
        return RunConfig.model_validate(translate(tree, where))
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None
