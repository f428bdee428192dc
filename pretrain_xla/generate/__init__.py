"""Text from a trained model: sampling, and a generator with static shapes (one compiled graph for any prompt)."""

from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling, sample

__all__ = ["Generator", "Sampling", "sample"]
