"""The mean loss over a fixed set of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain_xla.config import RunConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import ValidationLoss, loss
from pretrain_xla.model import GPT, initialize
from pretrain_xla.model.documents import Examples, number_documents
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from tests.small_run import TINY

Make = Callable[..., RunConfig]
LENGTH = TINY["seq_length"]
ROWS = 4


@pytest.fixture
def model(make_config: Make) -> GPT:
    model = GPT(make_config(model={"dropout": 0.5}).model)
    initialize(model, seed=1)
    return model


def validation(
    model: GPT, runtime: TorchRuntime, tokens: Path, steps: int, examples: Examples | None = None, rows: int = ROWS
) -> ValidationLoss:
    batches = Batches(
        open_dataset(str(tokens / "valid"), LENGTH, TINY["vocab_size"]),
        sequences_per_batch=rows,
        seq_length=LENGTH,
        seed=0,
        shuffle=False,
        once=True,
    )
    return ValidationLoss(model, runtime.forward(model), batches, runtime, steps, prefetch=2, examples=examples)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_mean_over_the_first_sequences(steps: int, model: GPT, runtime: TorchRuntime, tokens: Path) -> None:
    done: list[int] = []
    measured = validation(model, runtime, tokens, steps)(done.append)
    shard = torch.from_numpy(np.load(tokens / "valid" / "000.npy").astype(np.int64))
    count = steps * ROWS * LENGTH
    model.eval()
    with torch.no_grad():
        logits = model(shard[:count].reshape(-1, LENGTH))
    expected = F.cross_entropy(logits.flatten(0, 1), shard[1 : count + 1])
    assert measured == pytest.approx(float(expected), rel=1e-5)
    assert done == list(range(1, steps + 1))


def test_it_separates_documents_and_leaves_out_ignored_tokens(model: GPT, runtime: TorchRuntime, tokens: Path) -> None:
    measured = validation(model, runtime, tokens, 3, Examples(end_of_text=3, ignored=(3, 4, 5, 6)))()
    shard = torch.from_numpy(np.load(tokens / "valid" / "000.npy").astype(np.int64))
    rows, targets = shard[: 12 * LENGTH].reshape(-1, LENGTH), shard[1 : 12 * LENGTH + 1]
    targets = torch.where((targets >= 3) & (targets <= 6), -100, targets)
    model.eval()
    with torch.no_grad():
        logits = model(rows, None, number_documents(rows, 3))
    # The mean over the tokens of all batches: each batch ignores a different number of tokens.
    assert measured == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), targets)), rel=1e-5)


@pytest.mark.parametrize("examples", [Examples(), Examples(3, (3, 4, 5)), Examples(ignored=(0,))], ids=str)
def test_each_sequence_counts_once_whatever_the_size_of_a_batch(
    examples: Examples, model: GPT, runtime: TorchRuntime, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = torch.from_numpy(np.load(tokens / "valid" / "000.npy").astype(np.int64))
    count = (len(shard) - 1) // LENGTH
    rows, targets = shard[: count * LENGTH].reshape(-1, LENGTH), shard[1 : count * LENGTH + 1].clone()
    for token in examples.ignored:
        targets[targets == token] = -100
    model.eval()
    with torch.no_grad():
        logits = model(rows, None, None if examples.end_of_text is None else number_documents(rows, 3))
    expected = float(F.cross_entropy(logits.flatten(0, 1), targets))
    for size in (1, 2, 5, 7, count - 1, count, count + 1, 3 * count):
        assert validation(model, runtime, tokens, 99, examples, size)() == pytest.approx(expected, rel=2e-6), size
    monkeypatch.setattr(loss, "FETCHED_BATCHES", 3)  # the sums are fetched several at a time
    assert validation(model, runtime, tokens, 99, examples, 1)() == pytest.approx(expected, rel=2e-6)


def test_the_mean_of_many_batches_keeps_its_precision(model: GPT, runtime: TorchRuntime, tokens: Path) -> None:
    """If every batch has the same loss, so has their mean; a running sum in fp32 would drift."""
    np.save(tokens / "valid" / "000.npy", np.tile(np.arange(LENGTH), 401).astype(np.uint16))
    one = validation(model, runtime, tokens, 1, rows=1)()
    running = np.cumsum(np.full(400, one, np.float32), dtype=np.float32)[-1] / 400
    assert running != pytest.approx(one, rel=1e-7)
    assert validation(model, runtime, tokens, 400, rows=1)() == pytest.approx(one, rel=1e-12)


def test_a_validation_in_which_every_token_is_ignored_is_an_error(
    model: GPT, runtime: TorchRuntime, tokens: Path
) -> None:
    everything = Examples(ignored=tuple(range(TINY["vocab_size"])))
    with pytest.raises(UserError, match="leaves no token to predict"):
        validation(model, runtime, tokens, 1, everything)()


def test_it_is_the_same_every_time_and_leaves_the_model_as_it_was(
    model: GPT, runtime: TorchRuntime, tokens: Path
) -> None:
    measure = validation(model, runtime, tokens, 2)
    model.train()
    rng_state = torch.get_rng_state()
    first = measure()
    assert model.training
    assert torch.equal(rng_state, torch.get_rng_state()), "training's random state is unchanged"
    model.eval()
    assert measure() == first, "no dropout, whichever mode it was called in"
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_stops_at_the_end_of_the_data(model: GPT, runtime: TorchRuntime, tokens: Path) -> None:
    measure = validation(model, runtime, tokens, 1000)
    sequences = (100 - 1) // LENGTH
    assert measure.steps == -(-sequences // ROWS)
    assert 0 < measure() < 10
