"""The transformer: plain `torch.nn`, the same on every machine; it knows no mesh, no file and no runtime.

Read `gpt.py` first; `attention.py`, `feed_forward.py`, `norms.py` and `positions.py` are its parts, `layers.py` the two
kinds of matrix, `initialization.py` and `flops.py` what is done to a model and counted of it.
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
