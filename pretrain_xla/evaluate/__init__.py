"""Scores of a model: validation loss on fixed batches, perplexity by stride, zero-shot tasks.

A task goes through the files in this order: `task_data.py` (records from a file or the Hub), `prompts.py` (strings), `rows.py`
(tokens), `scorer.py` (log-probabilities, on the device) and `metrics.py` (scores). `tasks.py` lists the tasks, `evaluation.py`
runs several on one model. `loss.py` is the validation loss of training, `command.py` the command-line interface, and
`lm_eval_model.py` and `lm_eval_command.py` let lm-eval score a model of ours.
"""

from pretrain_xla.evaluate.evaluation import Evaluation, Result
from pretrain_xla.evaluate.loss import ValidationLoss
from pretrain_xla.evaluate.tasks import Settings

__all__ = ["Evaluation", "Result", "Settings", "ValidationLoss"]
