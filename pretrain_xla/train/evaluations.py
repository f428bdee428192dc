"""Evaluations in the training loop: validation loss and task scores, on the same data every time."""

from __future__ import annotations

from pretrain_xla.config import RunConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import TokenDataset
from pretrain_xla.evaluate import Evaluation, Settings, ValidationLoss
from pretrain_xla.model import GPT
from pretrain_xla.run_folder.build import build_examples
from pretrain_xla.run_folder.files import tokenizer_of
from pretrain_xla.runtime import Runtime
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.train.step import TrainStep


def build_validation(
    config: RunConfig, step: TrainStep, runtime: Runtime, dataset: TokenDataset, share: float
) -> ValidationLoss:
    """The loss on the first sequences of a dataset; `share` is the fraction of a batch's rows that this process reads."""
    train = config.train
    batches = Batches(
        dataset,
        sequences_per_batch=train.eval_batch_size,
        seq_length=config.model.seq_length,
        seed=0,
        shuffle=False,
        shuffle_window=1,
        once=True,
        steps=train.valid_steps,
        share=share * (2 + train.train_steps // train.valid_interval),
    )
    return ValidationLoss(
        step.model,
        step.forward,
        batches,
        runtime,
        train.valid_steps,
        config.data.prefetch_batches,
        build_examples(config, dataset),
    )


def build_evaluation(config: RunConfig, model: GPT, runtime: Runtime) -> Evaluation | None:
    """The tasks to score in the loop. None means that there are none. They are read and tokenized now, so that a missing file
    is reported before training."""
    evaluation = config.evaluation
    if not evaluation.eval_tasks:
        return None
    return Evaluation(
        model,
        runtime,
        lambda: load_tokenizer(tokenizer_of(config.data)),
        evaluation.eval_tasks,
        Settings(evaluation.eval_data, evaluation.eval_limit, evaluation.eval_stride, config.data.valid_dir),
        batch_size=config.train.eval_batch_size,
        top_k=evaluation.eval_top_k,
    )
