"""The optimizer and the learning rate; all of it runs inside the compiled step, on device tensors only.

Read `adamw.py` first (`AdamW.update`), then `clipping.py` (global norm) and `schedules.py` (learning rate as a function of the
step). The step uses four things of an optimizer: `names`, `parameters`, `state` and `update`; `run_folder/build.py` creates it.
"""

from pretrain_xla.optim.adamw import AdamW
from pretrain_xla.optim.schedules import learning_rate

__all__ = ["AdamW", "learning_rate"]
