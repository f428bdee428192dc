"""The optimizer and the training loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain_xla.config.section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class OptimConfig(Section):
    """The optimizer, and the learning rate over time."""

    optim_type: Literal["adam", "adamw"] = "adamw"
    """adamw decays weights directly; adam adds the decay to the gradient. Only matrices are decayed."""
    learning_rate: PositiveFloat = 6e-4
    """Highest learning rate, reached at the end of the warm-up (noam: a factor on its curve)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of matrices and embeddings."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip the global gradient norm to this; 0: no clipping."""
    decay_method: Literal["cosine", "linear", "noam", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd: constant, then linear over the last cooldown_steps."""
    warmup_steps: NonNegative = 1000
    """Steps of linear rise from 0."""
    min_lr: NonNegativeFloat = 6e-5
    """Learning rate at decay_steps and after."""
    decay_steps: Positive = 20000
    """Step at which the learning rate reaches min_lr."""
    cooldown_steps: Positive = 2000
    """wsd only: length of the final linear fall, ending at decay_steps."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.decay_method in ("cosine", "linear", "wsd"):
            fall_starts = self.decay_steps - self.cooldown_steps if self.decay_method == "wsd" else self.decay_steps
            if self.warmup_steps > fall_starts:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps} goes past step {fall_starts}, where {self.decay_method} has "
                    "to be at its top: shorten warmup_steps or cooldown_steps, or raise decay_steps"
                )
            if self.min_lr > self.learning_rate:
                raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower min_lr")
        if self.decay_method == "noam" and self.warmup_steps == 0:
            raise ValueError("warmup_steps=0 with decay_method=noam divides by zero: use at least 1")
        return self


class TrainConfig(Section):
    """The loop."""

    seed: NonNegative = 1061109567
    """Seed of weights, data order and dropout. A run that resumes keeps the order that its data were begun in."""
    train_batch_size: Positive = 32
    """Sequences in a micro-batch, over all devices; a step sees this times gradient_accum_step."""
    eval_batch_size: Positive = 32
    """Sequences in a validation batch, over all devices; the last one is padded, which changes no number."""
    gradient_accum_step: Positive = 1
    """Micro-batches accumulated in one step."""
    mixed_precision: Literal["bf16", "fp16"] | None = None
    """Compute in this type over fp32 weights; fp16 (with loss scaling) on CUDA only."""
    train_steps: Positive = 20000
    """Optimizer steps."""
    valid_steps: Positive = 100
    """Validation batches: the first valid_steps x eval_batch_size sequences of valid_dir, or all where there are fewer, each
    counted once; the same ones every time."""
    valid_interval: Positive = 1000
    """Steps between validations; there is always one before the first step and one after the last."""
    compile: bool = False
    """torch runtime: torch.compile. The xla runtime always compiles."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of fp32 matrix products."""
    mode: Literal["train", "evaluate", "preflight"] = "train"
    """evaluate: only print loss and perplexity on valid_dir, and end. preflight: only compile the training step for `topology`
    with the TPU's compiler, print what it needs and takes, and end."""
    from_checkpoint: str | None = None
    """Start from gpt2[-medium|-large|-xl], from any model of the Hub (owner/name), a Hugging Face folder or a .pt file, or from
    where another run stands: its folder, or one of its checkpoints. The architecture comes from there."""
    weights_only: bool = False
    """With from_checkpoint: take only a run's weights and begin at step 0, with new optimizer, schedule and order of data."""
    rematerialization: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: none; selective: all but attention and matrix products;
    full: each block from its input."""
    scan_layers: bool = False
    """xla: one compiled loop over the blocks instead of a copy of the program for each, so that 48 layers compile like 12. Each
    block is computed again from its input, as with rematerialization=full, and the step takes 2 to 4% longer than with that
    alone by the TPU compiler's estimate, in less memory. For deep models; selective is slower here (docs/LOG.md)."""
    loss_chunk: Positive | None = None
    """Tokens of a device whose logits exist at one time. None means all of a micro-batch. Saves memory, costs little time."""
    loss_ignore_tokens: tuple[NonNegative, ...] = ()
    """Token ids that do not count in the loss where they are what should follow, in training and in validation."""
    strict_graph: bool = False
    """Stop the run when a step recompiles, falls back to the host or waits for the device after warm-up."""

    @property
    def do_test(self) -> bool:
        """Whether the run only evaluates."""
        return self.mode == "evaluate"
