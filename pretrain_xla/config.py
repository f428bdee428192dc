"""What a run is: one frozen, validated tree of settings.

Each leaf is both a YAML key in its section and a flat command-line flag (`model.d_model` is `--d-model`), so a leaf's name
is unique in the whole tree. Precedence: default < YAML < flag. Everything that can be refused without a device is refused
here, in one line that names the key, the value and the mend.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain_xla.errors import UserError

MOST_WEIGHTS = 10**13
PRETRAINED_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=1024)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, and every leaf's docstring is its `--help` text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The transformer. The defaults are GPT-2 124M; `configs/` has the modern ones."""

    vocab_size: Size = 50257
    """Number of token ids; left out: that of the dataset.json beside the shards. The embedding is padded to `vocab_multiple`;
    padding never changes the loss."""
    vocab_multiple: Size = 128
    """Pad the embedding's rows to a multiple of this (128: the width of the TPU's matrix unit)."""
    seq_length: Size = 512
    """Tokens in a training sequence, and the number of learned positions."""
    d_model: Size = 768
    """Width of the residual stream."""
    num_layers: Layers = 12
    """Number of transformer blocks, up to 1024."""
    num_heads: Size = 12
    """Number of query heads."""
    num_kv_heads: Size | None = None
    """Number of key/value heads (grouped-query attention); none: as many as query heads."""
    head_dim: Size | None = None
    """Width of a head; none: d_model / num_heads."""
    d_ff: Size = 3072
    """Width of the feed-forward layer (of each of its two branches when gated)."""
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "silu"] = "gelu"
    """Feed-forward nonlinearity; gelu is the tanh form, as in GPT-2, and gelu_exact the one with erf, as in nanoGPT."""
    gated: bool = False
    """Gate the feed-forward layer: silu gives SwiGLU, gelu gives GeGLU."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"] = "layernorm"
    """Normalisation; zero_centered multiplies by (1 + weight), as in Gemma."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every normalisation."""
    post_norm: bool = False
    """Normalise also the output of attention and feed-forward, before it joins the residual stream."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How tokens know their place."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    qk_norm: bool = False
    """RMS-normalise each query and key head before the rotary turn."""
    query_scale: PositiveFloat | None = None
    """Factor on query-key products; none: head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    """Squash attention scores: cap * tanh(score / cap)."""
    logit_softcap: PositiveFloat | None = None
    """Squash the final logits: cap * tanh(logit / cap)."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    tie_weights: bool = False
    """Use the token embedding as the output head too."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping, on embeddings, attention weights and both residual branches."""
    init: Literal["gpt2", "normal", "fan_in"] = "gpt2"
    """gpt2: normal(0.02), residual projections divided by sqrt(2 layers); normal: normal(0.02) throughout; fan_in: std
    1/sqrt(fan-in), residual projections zero."""
    attention: Literal["sdpa", "reference"] = "sdpa"
    """sdpa: the machine's fused kernel, where it has one for these heads (TPU: ours; elsewhere PyTorch's); reference: plain
    matrix products around an fp32 softmax."""

    @property
    def heads_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}: "
                "change one of them, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.positions == "rotary" and self.heads_dim % 2:
            raise ValueError(f"head_dim={self.heads_dim} is odd, and rotary positions turn pairs: make it even")
        if self._weights > MOST_WEIGHTS:
            raise ValueError(
                f"num_layers={self.num_layers}, d_model={self.d_model}, d_ff={self.d_ff} and vocab_size={self.vocab_size} make "
                f"about {self._weights:.0e} parameters, which no machine holds: look for a slip of the keys in one of them"
            )
        return self

    @property
    def _weights(self) -> int:
        """Parameters in matrices and tables."""
        heads = 2 * self.heads_dim * (self.num_heads + self.kv_heads)
        rows = self.padded_vocab_size + (self.seq_length if self.positions == "learned" else 0)
        return self.d_model * (rows + self.num_layers * (heads + (3 if self.gated else 2) * self.d_ff))


class DataConfig(Section):
    """Where tokens come from, and in which order."""

    train_dir: str = "fineweb_edu/train"
    """Folder of token shards to train on, or a file, or a pattern with *; local, or a URL (gs://, s3://, hf://, https://)."""
    valid_dir: str = "fineweb_edu/valid"
    """The same to validate on; may be train_dir where file names say train and val."""
    cache_dir: str | None = None
    """Local folder where shards from elsewhere stay, shared by all processes; none: ~/.cache/pretrain_xla/shards."""
    cache_gb: PositiveFloat = 20.0
    """Most that cache_dir may hold, in GB; what was not used for longest goes first."""
    remote_reads: Literal["auto", "whole", "ranged"] = "auto"
    """Shards from elsewhere: fetched whole, or only the stretches that this process needs; auto: by how much that is."""
    drop_last: bool = False
    """Leave out, each epoch, the sequences that do not fill a whole batch (otherwise a batch runs on into the next epoch)."""
    shuffle_window: Positive = 8
    """Shards whose sequences are shuffled together; the order of shards is shuffled too. A run that resumes keeps its order."""
    prefetch_batches: Positive = 2
    """Batches read and copied to the device ahead of the step."""
    tokenizer: str | None = None
    """Tokenizer for text; none: the one recorded beside the shards, or gpt2."""
    separate_documents: bool = False
    """Attend only within a document: attention and learned positions begin anew after each end-of-text."""
    end_of_text: NonNegative | None = None
    """Token id that ends a document (gpt2: 50256); none: the one in the dataset.json beside the shards."""


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
    do_test: bool = False
    """Only evaluate: print loss and perplexity on valid_dir, and end."""
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
    """Tokens of a device whose logits exist at one time; none: all of a micro-batch. Saves memory, costs little time."""
    loss_ignore_tokens: tuple[NonNegative, ...] = ()
    """Token ids that do not count in the loss where they are what should follow, in training and in validation."""
    preflight_only: bool = False
    """Compile the training step for `topology` with the TPU's compiler, print what it needs and takes, and end."""
    use_syncfree_optim: bool = False
    """Accepted for old command lines: the optimizer never synchronises here."""
    strict_graph: bool = False
    """Stop the run when a step recompiles, falls back to the host or waits for the device after warm-up."""


class EvaluationConfig(Section):
    """Scores in the training loop, besides the validation loss (docs/evaluation.md says what each one is)."""

    eval_tasks: tuple[str, ...] = ()
    """shards, wikitext, text, hellaswag, hellaswag_llmc, lambada, piqa, arc_easy, winogrande; each NAME or NAME=SOURCE."""
    eval_interval: Positive | None = None
    """Steps between evaluations of eval_tasks; none: only after the last step."""
    eval_data: str | None = None
    """Folder with the tasks' files, found by how their names begin; none: the Hugging Face Hub."""
    eval_limit: Positive | None = None
    """Items of each task; none: all."""
    eval_stride: Positive | None = None
    """wikitext, text: tokens between the beginnings of windows; none: half of seq_length."""
    eval_top_k: tuple[Positive, ...] = (1, 5)
    """shards, wikitext, text: each k of the top-k accuracies."""


class ParallelConfig(Section):
    """Machines: which runtime, and how the devices are laid out."""

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
    """preflight: the TPU to compile for, as v5e:2x4, v5litepod-8 or v3-8; none: the one in this machine."""
    overlap_gradients: bool = False
    """TPU, replicas: reduce gradients while others are still being computed, by options of its compiler that have not been run
    on a TPU yet. Else they are reduced together, after the last one. Helps where a step is a single micro-batch."""
    compile_cache: str | None = None
    """TPU: local folder where compiled programs stay, so that a restart need not compile them again; none: no such folder.
    (XLA's CPU client stores programs too, but cannot load them.)"""
    mp_start_method: Literal["fork", "spawn"] | None = None
    """xla: run one process for each device (PJRT multiprocessing), started this way; none: SPMD."""
    ddp: bool = False
    """xla: multiprocessing with one replica for each device, as with mp_start_method."""
    ddp_backend: Literal["nccl", "gloo"] | None = None
    """torch under torchrun: collectives; none: nccl on CUDA, gloo on CPU."""

    @property
    def is_multiprocess(self) -> bool:
        """Whether the xla runtime runs one process for each device."""
        return self.mp_start_method is not None or self.ddp


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
    """Folder of config.yaml, metrics.jsonl, summary.json, loss.png and TensorBoard events; none: checkpoints_dir."""
    log_interval: Positive = 10
    """Steps between readings of the metrics; every step's values are kept."""
    sample_interval: Positive | None = None
    """Steps between samples of what the model writes, in run_dir/samples.txt and TensorBoard; none: no samples."""
    sample_prompt: str = ""
    """What the samples continue; empty: they begin a new text."""
    tensorboard: bool = True
    """Write TensorBoard events."""
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

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees, over all devices."""
        return self.train.train_batch_size * self.train.gradient_accum_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, over all devices."""
        return self.sequences_per_step * self.model.seq_length

    @property
    def run_dir(self) -> str:
        """Folder of the run's files."""
        return self.logging.run_dir or self.checkpoint.checkpoints_dir

    @property
    def checkpoints_dir(self) -> str:
        """Folder of checkpoints, with `run_dir` in front where that is set (an absolute path or URL stays)."""
        if self.logging.run_dir is None or "://" in self.checkpoint.checkpoints_dir:
            return self.checkpoint.checkpoints_dir
        return os.path.join(self.logging.run_dir, self.checkpoint.checkpoints_dir)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        vocab_size, end_of_text = self.model.vocab_size, self.data.end_of_text
        named = [("loss_ignore_tokens", token) for token in self.train.loss_ignore_tokens]
        for key, token in named if end_of_text is None else [*named, ("end_of_text", end_of_text)]:
            if token >= vocab_size:
                raise ValueError(f"{key}={token} is no token of vocab_size={vocab_size}: give an id below that")
        if self.train.weights_only and self.train.from_checkpoint is None:
            raise ValueError("weights_only=True takes the weights of from_checkpoint, and there is none: name it")
        if self.train.mixed_precision == "fp16" and self.parallel.runtime == "xla":
            raise ValueError("mixed_precision=fp16 needs CUDA (runtime=torch): XLA devices compute in bf16")
        again = self.train.rematerialization != "none" or self.train.scan_layers
        if self.model.dropout and again and self.parallel.runtime == "xla":
            key = "scan_layers" if self.train.scan_layers else "rematerialization"
            raise ValueError(
                f"dropout={self.model.dropout} with {key}={getattr(self.train, key)}: a block that is computed again would "
                "drop others than the first time, and its gradients be wrong: use dropout=0, or leave the other out"
            )
        if self.checkpoint.hub_repo and "://" in self.checkpoints_dir:
            raise ValueError(
                f"hub_repo={self.checkpoint.hub_repo} is filled from a local folder, and checkpoints_dir="
                f"{self.checkpoints_dir} is a URL: use one of them"
            )
        if "://" in self.run_dir and not self.train.do_test:
            key = "run_dir" if self.logging.run_dir else "checkpoints_dir"
            raise ValueError(
                f"{key}={self.run_dir} is a URL, and metrics are appended to on a local disk: name a local --run-dir "
                "(checkpoints_dir may stay a URL)"
            )
        return self


def _leaves(section: type[BaseModel]) -> dict[str, str]:
    """Leaf name → its section's name, for every leaf of the tree."""
    return {
        leaf: name
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for leaf in field.annotation.model_fields
    }


LEAVES = _leaves(RunConfig)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


def _one_line(error: ValidationError, where: str) -> str:
    """The first fault of a pydantic error, as one line for a person."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        parents = fault["loc"][:-1]
        fields: Any = RunConfig.model_fields if not parents else RunConfig.model_fields[str(parents[0])].annotation
        known = list(fields if not parents else fields.model_fields)
        last = str(fault["loc"][-1])
        if last in LEAVES:
            return f"{where}: key {key!r} is in the wrong place: it belongs under {LEAVES[last]!r}"
        return f"{where}: unknown key {key!r}{_nearest(last, known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {key}={_shown(fault['input'])}: {message}"


def _shown(value: Any) -> str:
    """A value as a person wrote it, cut where it is long: a YAML file of ten lines can hold a list of a billion."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 200
    shortener.maxlevel = 2
    try:
        return shortener.repr(value)
    except ValueError:
        return "(a number of thousands of digits)"


def build_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validate a nested dict into a `RunConfig`.

    Args:
        tree: section name → leaf name → value; sections and leaves that are left out take their defaults.
        where: where the values came from, for the error message.

    Raises:
        UserError: unknown key, bad value or impossible combination, in one line.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None
