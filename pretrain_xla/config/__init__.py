"""The configuration of a run: one frozen, validated tree of settings.

Each leaf is both a YAML key in its section and a flat command-line flag (`model.d_model` is `--d-model`), so a leaf's name is
unique in the whole tree. Precedence: default < YAML < flag. Everything that can be checked without a device is checked here,
with an error of one line that names the key, the value and the fix. `run.py` defines the tree, `old_settings.py` translates
older command lines, and the other files define the sections.
"""

from pretrain_xla.config.data import DataConfig, EvaluationConfig
from pretrain_xla.config.model import ModelConfig
from pretrain_xla.config.output import CheckpointConfig, LoggingConfig, WandbConfig
from pretrain_xla.config.parallel import ParallelConfig
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
