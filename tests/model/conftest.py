"""Small models and batches for the tests of `pretrain_xla.model`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, initialize

TINY = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "seq_length": 12,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 40,
}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on many threads, and much slower when other processes have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """A small configuration, with changes."""
    return lambda **changes: ModelConfig(**(TINY | changes))


@pytest.fixture
def build() -> Callable[..., GPT]:
    """A model whose every weight is noise, norms and biases too: a weight left out of the computation changes the result."""

    def build(config: ModelConfig, compute_dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
        model = GPT(config, compute_dtype)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return build


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and targets."""

    def batch(config: ModelConfig, rows: int = 2, dtype: torch.dtype = torch.int64) -> Any:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, config.vocab_size, (rows, config.seq_length + 1), generator=generator)
        return ids[:, :-1].to(dtype).contiguous(), ids[:, 1:].to(dtype).contiguous()

    return batch
