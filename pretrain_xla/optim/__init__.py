"""Parameter groups, AdamW and learning-rate schedules; all of it runs inside the compiled step."""

from pretrain_xla.optim.adamw import AdamW
from pretrain_xla.optim.schedules import learning_rate

__all__ = ["AdamW", "learning_rate"]
