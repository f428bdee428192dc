"""Scores of a model: validation loss now, on the same fixed batches every time."""

from pretrain_xla.evaluate.loss import ValidationLoss

__all__ = ["ValidationLoss"]
