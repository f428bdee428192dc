"""Data, and what is scored while a run trains."""

from __future__ import annotations

from typing import Literal

from pretrain_xla.config.section import NonNegative, Positive, PositiveFloat, Section


class DataConfig(Section):
    """Where tokens come from, and in which order."""

    train_dir: str = "fineweb_edu/train"
    """Folder of token shards to train on, or a file, or a pattern with *; local, or a URL (gs://, s3://, hf://, https://)."""
    valid_dir: str = "fineweb_edu/valid"
    """The same to validate on; may be train_dir where file names say train and val."""
    cache_dir: str | None = None
    """Local folder where shards from elsewhere stay, shared by all processes. None means ~/.cache/pretrain_xla/shards."""
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
    """Tokenizer for text. None means the one recorded in the dataset.json of the shards, or gpt2."""
    separate_documents: bool = False
    """Attend only within a document: attention and learned positions begin anew after each end-of-text."""
    end_of_text: NonNegative | None = None
    """Token id that ends a document (gpt2: 50256). None means the one in the dataset.json of the shards."""


class EvaluationConfig(Section):
    """Scores in the training loop, besides the validation loss (docs/evaluation.md says what each one is)."""

    eval_tasks: tuple[str, ...] = ()
    """shards, wikitext, text, hellaswag, hellaswag_llmc, lambada, piqa, arc_easy, winogrande; each NAME or NAME=SOURCE."""
    eval_interval: Positive | None = None
    """Steps between evaluations of eval_tasks. None means only after the last step."""
    eval_data: str | None = None
    """Folder with the tasks' files, found by how their names begin. None means the Hugging Face Hub."""
    eval_limit: Positive | None = None
    """Items of each task. None means all."""
    eval_stride: Positive | None = None
    """wikitext, text: tokens between the beginnings of windows. None means half of seq_length."""
    eval_top_k: tuple[Positive, ...] = (1, 5)
    """shards, wikitext, text: each k of the top-k accuracies."""
