"""The transformer: plain `torch.nn`, the same on every machine; it knows no mesh, no file, no compiler and no runtime.

Read `gpt.py` first, with `attention.py`, `layers.py` and `loss.py`: that is all of it. `initialization.py` gives it its first
values; `documents.py` keeps documents of one row apart; `flops.py` counts it, and `trace.py` draws it. `xla/` is the version
for TPUs, put in by `optimize_for_xla`; `torch_rewrite.py` has what saves memory in plain PyTorch.
"""

from pretrain_xla.model.execution import Execution
from pretrain_xla.model.flops import flops_per_token, forward_flops_per_token, parameter_count
from pretrain_xla.model.gpt import GPT
from pretrain_xla.model.initialization import initialize
from pretrain_xla.model.loss import cross_entropy

__all__ = [
    "GPT",
    "Execution",
    "cross_entropy",
    "flops_per_token",
    "forward_flops_per_token",
    "initialize",
    "parameter_count",
]
