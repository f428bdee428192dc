"""What a run is: one frozen, validated tree of settings.

Each leaf is both a YAML key in its section and a flat command-line flag (`model.d_model` is `--d-model`), so a leaf's name is
unique in the whole tree. Precedence: default < YAML < flag. Everything that can be refused without a device is refused here,
in one line that names the key, the value and the fix. `run.py` has the tree,
`old_settings.py` what older command lines say; each other file has some of the sections.
"""

from pretrain_xla.config.data import DataConfig, EvaluationConfig
from pretrain_xla.config.machine import CheckpointConfig, LoggingConfig, ParallelConfig, WandbConfig
from pretrain_xla.config.model import ModelConfig
from pretrain_xla.config.run import LEAVES, RunConfig, build_config
from pretrain_xla.config.section import Section
from pretrain_xla.config.training import OptimConfig, TrainConfig

PRETRAINED_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

__all__ = [
    "LEAVES",
    "PRETRAINED_MODELS",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "WandbConfig",
    "build_config",
]
