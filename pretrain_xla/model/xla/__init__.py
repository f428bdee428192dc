"""The model as a TPU runs it best: `optimize_for_xla` replaces modules of a built model by versions that compute the same.

`rewrite.py` is the one call, and lists what is replaced by what. Nothing here imports torch_xla: what a compiler and a mesh
provide comes in as an `XlaContext`, for which plain Python stands in where there is none, as in the tests.
"""

from pretrain_xla.model.xla.context import XlaContext
from pretrain_xla.model.xla.rewrite import XlaGPT, optimize_for_xla

__all__ = ["XlaContext", "XlaGPT", "optimize_for_xla"]
