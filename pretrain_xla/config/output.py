"""What a run writes: checkpoints, metrics and samples."""

from __future__ import annotations

from pretrain_xla.config.section import Positive, Section


class CheckpointConfig(Section):
    """Saving and resuming."""

    checkpoints_dir: str = "checkpoints"
    """Folder of checkpoints: a local path or a URL. A relative path is inside run_dir, if run_dir is set."""
    save_interval: Positive = 1000
    """Steps between checkpoints; the last step is always saved. Only a step that is also validated can become the best
    checkpoint, so use a multiple of valid_interval."""
    saved_checkpoint_limit: Positive = 10
    """Number of newest checkpoints to keep. The one with the best validation loss is kept as well."""
    keep_interval: Positive | None = None
    """Checkpoints of steps that are a multiple of this are kept for good. None means that none are."""
    resume: bool = True
    """Continue from the newest complete checkpoint in checkpoints_dir, if there is one."""
    hub_repo: str | None = None
    """Repository on the Hugging Face Hub (owner/name) to push each checkpoint to. It is created as private if it does not
    exist. If checkpoints_dir is empty, the run resumes from it. None means that nothing is pushed."""


class LoggingConfig(Section):
    """Metrics, samples and the folder of the run."""

    run_dir: str | None = None
    """Folder of config.yaml, metrics.jsonl, summary.json, loss.png and TensorBoard events. None means checkpoints_dir."""
    log_interval: Positive = 10
    """Steps between log lines. metrics.jsonl has every step."""
    sample_interval: Positive | None = None
    """Steps between text samples, written to run_dir/samples.txt and TensorBoard. None means no samples."""
    sample_prompt: str = ""
    """Prompt of the text samples. Empty means that they start a new document."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class WandbConfig(Section):
    """Weights & Biases, which is off by default."""

    wandb_logging: bool = False
    """Log to Weights & Biases (needs `pip install wandb`)."""
    wandb_project: str = "pre-training-gpt2"
    """Project."""
    wandb_name: str = "base"
    """Name of the run."""
    wandb_logging_interval: Positive = 500
    """Steps between uploads; the last step is always uploaded."""
    wandb_resume_id: str | None = None
    """Id of the W&B run to continue. None means a new one, or its own for a run that resumes."""
    wandb_notes: str | None = None
    """Notes on the run. None means no notes."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
