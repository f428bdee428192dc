"""Training data, and evaluation during training."""

from __future__ import annotations

from typing import Literal

from pretrain_xla.config.section import NonNegative, Positive, PositiveFloat, Section


class DataConfig(Section):
    """Token shards and their order."""

    train_dir: str = "fineweb_edu/train"
    """Training data: a folder of token shards, a file, or a pattern with *. A local path or a URL (gs://, s3://, hf://,
    https://)."""
    valid_dir: str = "fineweb_edu/valid"
    """Validation data, likewise. It may equal train_dir if the file names contain train and val."""
    cache_dir: str | None = None
    """Local folder that caches remote shards, shared by all processes. None means ~/.cache/pretrain_xla/shards."""
    cache_gb: PositiveFloat = 20.0
    """Maximum size of cache_dir in GB. The least recently used shards are removed first."""
    remote_reads: Literal["auto", "whole", "ranged"] = "auto"
    """Remote shards. whole: fetch whole shards. ranged: fetch only the ranges that this process needs. auto: choose by how much
    it needs."""
    drop_last: bool = False
    """Drop the last, incomplete batch of each epoch. Otherwise it is filled from the next epoch."""
    shuffle_window: Positive = 8
    """Number of shards whose sequences are shuffled together. The order of the shards is shuffled too. A resumed run keeps the
    order that it started with."""
    prefetch_batches: Positive = 2
    """Number of batches to read and copy to the device ahead of the step."""
    tokenizer: str | None = None
    """Tokenizer of the data. None means the one in the shards' dataset.json, or gpt2."""
    separate_documents: bool = False
    """Attend only within a document. Learned positions start again at 0 in each document."""
    end_of_text: NonNegative | None = None
    """Id of the token that ends a document (gpt2: 50256). None means the one in the shards' dataset.json."""


class EvaluationConfig(Section):
    """Evaluation tasks during training, in addition to the validation loss (see docs/evaluation.md)."""

    eval_tasks: tuple[str, ...] = ()
    """Any of shards, wikitext, text, hellaswag, hellaswag_llmc, lambada, piqa, arc_easy, winogrande, each as NAME or
    NAME=SOURCE."""
    eval_interval: Positive | None = None
    """Steps between evaluations of eval_tasks. None means only after the last step."""
    eval_data: str | None = None
    """Folder with the tasks' files, found by the start of their names. None means the Hugging Face Hub."""
    eval_limit: Positive | None = None
    """Number of items of each task (questions, passages, windows, sequences). None means all."""
    eval_stride: Positive | None = None
    """wikitext, text: tokens between the starts of windows. None means half of seq_length."""
    eval_top_k: tuple[Positive, ...] = (1, 5)
    """shards, wikitext, text: the values of k for top-k accuracy."""
