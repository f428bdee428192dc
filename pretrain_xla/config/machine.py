"""Devices, checkpoints and records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain_xla.config.section import Positive, Section


class ParallelConfig(Section):
    """The runtime, and how the devices are laid out."""

    runtime: Literal["xla", "torch"] = "xla"
    """xla: TPU or CPU through XLA (PJRT_DEVICE); torch: GPU or CPU, alone or under torchrun."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """torch runtime: device; auto takes CUDA where there is one."""
    mesh_data: Annotated[int, Field(ge=-1)] = -1
    """xla: devices along the data axis (replicas); -1: all that the other axes leave."""
    mesh_fsdp: Positive = 1
    """xla: devices over which parameters and optimizer state are sharded, each with its own rows of the batch."""
    mesh_tensor: Positive = 1
    """xla: devices that share each matrix product."""
    topology: str | None = None
    """preflight: the TPU to compile for, as v5e:2x4, v5litepod-8 or v3-8. None means the one of this host."""
    overlap_gradients: bool = False
    """TPU, replicas: reduce gradients while others are still being computed, by options of its compiler that have not been run
    on a TPU yet. Else they are reduced together, after the last one. Helps where a step is a single micro-batch."""
    compile_cache: str | None = None
    """TPU: local folder where compiled programs stay, so that a restart need not compile them again. None means no such folder.
    (XLA's CPU client stores programs too, but cannot load them.)"""
    mp_start_method: Literal["fork", "spawn"] | None = None
    """xla: run one process and one replica for each device (PJRT multiprocessing), started this way. None means SPMD."""
    ddp_backend: Literal["nccl", "gloo"] | None = None
    """torch under torchrun: collectives. None means nccl on CUDA, gloo on CPU."""

    @property
    def is_multiprocess(self) -> bool:
        """Whether the xla runtime runs one process for each device."""
        return self.mp_start_method is not None


class CheckpointConfig(Section):
    """What survives the run."""

    checkpoints_dir: str = "checkpoints"
    """Folder of checkpoints; relative to run_dir when that is set."""
    save_interval: Positive = 1000
    """Steps between checkpoints; the last step is always saved. Which one is best is known of those steps alone that are
    validated: use a multiple of valid_interval."""
    saved_checkpoint_limit: Positive = 10
    """Newest checkpoints kept; the one with the best validation loss is kept as well."""
    resume: bool = True
    """Continue from the newest complete checkpoint in checkpoints_dir, if there is one."""
    hub_repo: str | None = None
    """Push each checkpoint to this repository of the Hugging Face Hub (owner/name; made private where it is missing), and
    continue from it where checkpoints_dir is empty."""


class LoggingConfig(Section):
    """What one sees of the run."""

    run_dir: str | None = None
    """Folder of config.yaml, metrics.jsonl, summary.json, loss.png and TensorBoard events. None means checkpoints_dir."""
    log_interval: Positive = 10
    """Steps between readings of the metrics; every step's values are kept."""
    sample_interval: Positive | None = None
    """Steps between samples of what the model writes, in run_dir/samples.txt and TensorBoard. None means no samples."""
    sample_prompt: str = ""
    """What the samples continue; empty: they begin a new text."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class WandbConfig(Section):
    """Weights & Biases; skip it unless you use it."""

    wandb_logging: bool = False
    """Log to Weights & Biases (needs `pip install wandb`)."""
    wandb_project: str = "pre-training-gpt2"
    """Weights & Biases project."""
    wandb_name: str = "base"
    """Name of the run there."""
    wandb_logging_interval: Positive = 500
    """Steps between uploads; the last step is always uploaded."""
    wandb_resume_id: str | None = None
    """Id of the run there to continue."""
    wandb_notes: str | None = None
    """Notes on the run there."""
    wandb_tags: tuple[str, ...] = ()
    """Tags on the run there."""
