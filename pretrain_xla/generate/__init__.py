"""Text generation with a key/value cache of static shape: one compiled graph for prefill and one for decode.

Read `generator.py` first (`Generator`: model and tokenizer on a device), then `continuation.py` (which call comes next),
`decoder.py` (what is compiled) with `cache.py`, `sampling.py` (choosing a token), `window.py` (texts longer than the context)
and `text.py` (from tokens to text). `command.py` is the command-line interface.
"""

from pretrain_xla.generate.continuation import Request
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling

__all__ = ["Generator", "Request", "Sampling"]
