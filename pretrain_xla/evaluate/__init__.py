"""Scores of a model: validation loss on the same fixed batches every time, perplexity by stride, zero-shot tasks."""

from pretrain_xla.evaluate.evaluation import Evaluation, Result
from pretrain_xla.evaluate.loss import ValidationLoss
from pretrain_xla.evaluate.tasks import Settings

__all__ = ["Evaluation", "Result", "Settings", "ValidationLoss"]
