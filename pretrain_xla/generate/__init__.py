"""Text from a trained model, by a key/value cache of static shape: two compiled graphs, one that reads and one that writes.

Read `generator.py` first; `continuation.py` decides which call comes next, `decoder.py` is what is compiled, `sampling.py` the
choice of a token, `window.py` what is seen of a long text.
"""

from pretrain_xla.generate.continuation import Request
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling

__all__ = ["Generator", "Request", "Sampling"]
