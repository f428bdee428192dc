"""The optimizer and the training loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain_xla.config.duration import Duration
from pretrain_xla.config.section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class OptimConfig(Section):
    """The optimizer and the learning rate schedule."""

    optim_type: Literal["adam", "adamw", "muon"] = "adamw"
    """adamw: decoupled weight decay. adam: the decay is added to the gradient (L2 regularisation). muon: Muon for the matrices
    of the blocks, AdamW for all else."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate, reached at the end of warm-up. noam: factor on the schedule."""
    embedding_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the embeddings, and of the head where it is tied. None means learning_rate."""
    head_learning_rate: PositiveFloat | None = None
    """Peak learning rate of an untied head. None means learning_rate."""
    scalar_learning_rate: PositiveFloat | None = None
    """Peak learning rate of norms, biases and other parameters that are not matrices. None means learning_rate."""
    base_d_model: Positive | None = None
    """d_model for which the learning rates were chosen. A model of another width has the head's learning rate, and AdamW's of
    the blocks' matrices, divided by the ratio of the widths, and the weight decay times it. None means the model's own."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    embedding_betas: tuple[Beta, Beta] | None = None
    """betas of the embeddings. None means betas."""
    head_betas: tuple[Beta, Beta] | None = None
    """betas of an untied head. None means betas."""
    scalar_betas: tuple[Beta, Beta] | None = None
    """betas of norms, biases and other parameters that are not matrices. None means betas."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices and embeddings, times the learning rate; biases and norms are not decayed."""
    embedding_weight_decay: NonNegativeFloat | None = None
    """Weight decay of embeddings and head. None means weight_decay."""
    weight_decay_schedule: Literal["constant", "learning_rate"] = "constant"
    """learning_rate: the weight decay itself follows the learning rate's schedule too, so that it ends with it."""
    cautious_weight_decay: bool = False
    """muon: decay only those weights that the update moves towards zero."""
    muon_momentum: Beta = 0.95
    """muon: decay rate of the momentum."""
    muon_momentum_warmup: NonNegative = 0
    """muon: steps in which the momentum rises from 0.85 to muon_momentum. 0 means none."""
    muon_row_beta: Beta = 0.0
    """muon: decay rate of the mean square of each row's update, by whose root the row is divided (NorMuon). 0 means none."""
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """muon: factor on an update of R rows and C columns. match_rms_adamw: 0.2 * sqrt(max(R, C)), which suits learning rates
    and weight decays of AdamW. original: sqrt(max(1, R / C)), for learning rates around 0.02."""
    muon_iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """muon: Newton-Schulz iterations."""
    muon_polynomials: Literal["polar_express", "quintic"] = "polar_express"
    """muon: what an iteration does. quintic: the same polynomial each time, as in torch.optim.Muon."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip the global gradient norm to this. 0 means no clipping."""
    decay_method: Literal["cosine", "linear", "noam", "constant", "wsd"] = "cosine"
    """Learning rate schedule after warm-up. wsd: constant, then linear decay over the last cooldown_steps."""
    warmup_steps: NonNegative = 1000
    """Steps of linear warm-up from 0."""
    min_lr: NonNegativeFloat = 6e-5
    """Learning rate at decay_steps and after. Not used by noam and constant."""
    min_lr_fraction: Fraction | None = None
    """The same as a fraction of learning_rate. None means min_lr."""
    decay_steps: Positive = 20000
    """Step at which the learning rate reaches min_lr. Not used by noam and constant."""
    cooldown_steps: Positive = 2000
    """wsd: steps of the final linear decay, which ends at decay_steps."""
    cooldown_fraction: Fraction | None = None
    """wsd: the same as a fraction of decay_steps. None means cooldown_steps."""
    average_fraction: Fraction = 0.0
    """Validate, sample, generate and export with the mean of the weights over this last fraction of decay_steps, which is kept
    as one more fp32 copy of the weights. 0 means none."""

    @property
    def cooldown(self) -> int:
        """Steps of wsd's final decay."""
        return (
            self.cooldown_steps if self.cooldown_fraction is None else round(self.cooldown_fraction * self.decay_steps)
        )

    @property
    def floor(self) -> float:
        """Learning rate at decay_steps, as a fraction of the peak."""
        return self.min_lr / self.learning_rate if self.min_lr_fraction is None else self.min_lr_fraction

    @property
    def average_from(self) -> int | None:
        """Updates before those whose weights are averaged. None means that there is no average."""
        return round((1.0 - self.average_fraction) * self.decay_steps) if self.average_fraction else None

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.decay_method in ("cosine", "linear", "wsd"):
            fall_starts = self.decay_steps - self.cooldown if self.decay_method == "wsd" else self.decay_steps
            cooldown = " or cooldown_steps" if self.cooldown_fraction is None else " or cooldown_fraction"
            if self.warmup_steps > fall_starts:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps} goes past step {fall_starts}, where the decay of {self.decay_method} "
                    f"starts: lower warmup_steps{cooldown if self.decay_method == 'wsd' else ''}, or raise decay_steps"
                )
            if self.min_lr_fraction is None and self.min_lr > self.learning_rate:
                raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower min_lr")
        if self.decay_method == "noam" and self.warmup_steps == 0:
            raise ValueError("warmup_steps=0 with decay_method=noam divides by zero: use at least 1")
        return self


class TrainConfig(Section):
    """The training loop."""

    seed: NonNegative = 1061109567
    """Seed of the initial weights, the data order and dropout. A resumed run keeps the data order that it started with."""
    train_batch_size: Positive = 32
    """Sequences in a micro-batch, over all devices. A step trains on gradient_accum_step times as many."""
    eval_batch_size: Positive = 32
    """Sequences in a validation batch, over all devices. The last batch is padded, which does not change the loss."""
    gradient_accum_step: Positive = 1
    """Micro-batches in a step, whose gradients are accumulated."""
    mixed_precision: Literal["bf16", "fp16"] | None = None
    """Compute in this type, with fp32 weights. fp16 uses loss scaling and needs CUDA. None means fp32."""
    train_steps: Positive = 20000
    """Number of optimizer steps."""
    valid_steps: Positive = 100
    """Number of validation batches. Each validation uses the same sequences: the first valid_steps x eval_batch_size of
    valid_dir, or all of them if there are fewer."""
    valid_interval: Positive = 1000
    """Steps between validations. The run also validates before the first step and after the last one."""
    compile: bool = False
    """torch: use torch.compile. The xla runtime always compiles."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of fp32 matrix products."""
    mode: Literal["train", "evaluate", "preflight"] = "train"
    """evaluate: only print the loss and perplexity on valid_dir. preflight: only compile the training step for `topology` with
    the TPU compiler, and print its memory, time and cost."""
    from_checkpoint: str | None = None
    """Start from this model, with its architecture: gpt2[-medium|-large|-xl], a model on the Hugging Face Hub (owner/name), a
    Hugging Face folder or a .pt file. Or continue from another run: its folder, or one of its checkpoints. None means new
    weights."""
    weights_only: bool = False
    """With from_checkpoint: take only the weights of another run, and start at step 0 with a new optimizer, schedule and data
    order."""
    rematerialization: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes, to save memory. none: nothing. selective: all but attention and matrix products. full:
    each block, from its input."""
    scan_layers: bool = False
    """xla: compile one loop over the blocks (scan) instead of every block, so that 48 layers compile as fast as 12. Blocks are
    recomputed, as with rematerialization=full; selective is slower here. A step takes 2 to 4% longer than with full alone, and
    needs less memory, by the TPU compiler's estimate (docs/LOG.md)."""
    loss_chunk: Positive | None = None
    """Compute the logits of only this many tokens per device at a time. Saves memory and costs little time. None means all
    tokens of a micro-batch."""
    loss_ignore_tokens: tuple[NonNegative, ...] = ()
    """Targets with these token ids do not count in the training and validation loss."""
    max_skipped_updates: Positive = 10
    """Stop the run after this many skipped updates in a row. An update is skipped if its loss or its gradient is NaN or
    infinite, or a spike (spike_sigma). Overflows by which fp16 finds its loss scale do not count."""
    spike_sigma: PositiveFloat | None = None
    """Also skip an update whose loss or gradient norm lies more than this many standard deviations above the mean of the last
    spike_window steps; 6 is usual. None means that no finite update is skipped."""
    spike_window: Annotated[int, Field(ge=4, le=100_000)] = 128
    """Steps whose losses and gradient norms spike_sigma compares with. Nothing is skipped before half as many."""
    hang_timeout: PositiveFloat | None = 1800.0
    """Seconds without progress after which the run prints the stack of every thread and exits with status 75, for a supervisor
    to start it again. Must be longer than the longest compilation. None means that it may hang."""
    stop_after: Duration | None = None
    """Stop this long after the start, as after SIGTERM: finish the step, save, and exit with status 143. Such as 8h30m: a bit
    less than the machine is lent for. The same command continues. None means no limit."""
    strict_graph: bool = False
    """Stop the run if, after the first step, a step recompiles, falls back to the host or waits for the device."""
