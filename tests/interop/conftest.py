"""Small models in which every weight affects the output, and helpers that open exports in `transformers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
import transformers
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, initialize

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

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
    """Tensors this small take longer to share out than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> ModelConfig:
    """A small configuration, with changes."""
    return ModelConfig.model_validate(TINY | changes)


def noise(model: Any, seed: int = 0, size: float = 0.2) -> Any:
    """Noise in every weight: freshly built, norms and biases are the identity and would hide a wrong name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(config: ModelConfig, seed: int = 0) -> GPT:
    """A model of ours with noise in every weight."""
    model = GPT(config)
    initialize(model, seed)
    noisy: GPT = noise(model, seed)
    return noisy


def tokens(vocab_size: int, length: int, rows: int = 2) -> Tensor:
    """Random token ids."""
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


def open_in_transformers(folder: Path) -> Any:
    """The model as a user opens it; every tensor of it must have come from the file."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def assert_same_logits(ours: GPT, theirs: Any, length: int | None = None) -> None:
    """Equal to 1e-5 in fp32, on logits that are not all alike."""
    ids_BT = tokens(ours.config.vocab_size, length or ours.config.seq_length)
    with torch.no_grad():
        expected_BTV, actual_BTV = theirs(ids_BT).logits, ours.eval()(ids_BT)
    assert expected_BTV.std() > 0.1
    torch.testing.assert_close(actual_BTV, expected_BTV[..., : ours.config.vocab_size], atol=1e-5, rtol=1e-5)


def assert_same_greedy(ours: GPT, theirs: Any, prompt_1T: Tensor) -> None:
    """Of the 30 tokens that they write greedily, with their cache, each is the likeliest one of ours."""
    written_1T = theirs.generate(prompt_1T, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert written_1T.shape[1] == prompt_1T.shape[1] + 30
    with torch.no_grad():
        chosen_1T = ours.eval()(written_1T[:, :-1]).argmax(-1)
    assert torch.equal(chosen_1T[:, prompt_1T.shape[1] - 1 :], written_1T[:, prompt_1T.shape[1] :])


def assert_same_tensors(actual: dict[str, Tensor], model: GPT) -> None:
    """Bit for bit, but for the rows of padding."""
    expected = dict(model.named_parameters())
    assert set(actual) == set(expected)
    for name, value in expected.items():
        rows = model.config.vocab_size if name in ("embedding.weight", "head.weight") else len(value)
        assert torch.equal(actual[name][:rows], value[:rows]), name
        assert not actual[name][rows:].any()


Opener = Callable[[Path], Any]
