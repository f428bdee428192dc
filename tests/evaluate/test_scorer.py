"""Scores of rows compared with a plain softmax, for any padding, batch size and order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import scorer as module
from pretrain_xla.evaluate.scorer import Row, Score

from .conftest import LENGTH, Trio


@pytest.fixture
def rows(trio: Trio) -> list[Row]:
    """Rows of every length, in no order."""
    draws = np.random.default_rng(1)
    result = []
    for length in draws.permutation(np.arange(2, LENGTH + 2)):
        tokens = draws.integers(0, trio.ours.config.vocab_size, length).astype(np.int32)
        result.append(Row(tokens, int(draws.integers(1, length))))
    return result


def plainly(trio: Trio, row: Row, top_k: tuple[int, ...]) -> Score:
    """Without padding and without batches, by transformers."""
    with torch.no_grad():
        logits_TV = trio.theirs(torch.from_numpy(row.tokens[:-1]).long()[None]).logits[0, row.start - 1 :]
    targets_T = torch.from_numpy(row.tokens[row.start :]).long()
    logprobs_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    order_TV = logits_TV.argsort(dim=-1, descending=True, stable=True)
    hits = tuple(int((order_TV[:, :k] == targets_T[:, None]).any(-1).sum()) for k in top_k)
    return Score(float(logprobs_T.sum()), row.count, hits)


def assert_equal(found: list[Score], expected: list[Score]) -> None:
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], rel=1e-5)
    assert [(score.count, score.hits) for score in found] == [(score.count, score.hits) for score in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_like_a_plain_softmax(batch_size: int, trio: Trio, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [plainly(trio, row, (1, 5)) for row in rows]
    assert any(score.hits[1] for score in expected)
    seen: list[int] = []
    assert_equal(trio.scorer(batch_size)(rows, seen.append), expected)
    assert seen == sorted(seen)
    assert seen[-1] == len(rows)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * trio.ours.config.padded_vocab_size)
    assert_equal(trio.scorer(batch_size)(rows), expected)  # the logits in many parts


def test_greedy_is_every_token_the_likeliest(trio: Trio) -> None:
    tokens = trio.tokenizer.encode("A man")
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(trio.theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
    row = Row(np.array(tokens, np.int32), len(tokens) - 6)
    other = Row(np.array([*tokens[:-1], (tokens[-1] + 1) % 9], np.int32), row.start)
    assert [score.greedy for score in trio.scorer()([row, other])] == [True, False]


def test_of_equal_logits_the_first_is_the_likelier(trio: Trio) -> None:
    logits_RTV = torch.zeros(1, 4, 6)
    logits_RTV[0, :, 4] = -1.0
    targets_RT = torch.tensor([[0, 1, 4, -100]])
    logprob, *hits = trio.scorer(top_k=(2, 5))._sums(logits_RTV, targets_RT)[0].tolist()
    assert hits == [1, 2, 2]  # k = 1: the first only, as argmax; 2: both of the equals; 5: not the last of six
    assert logprob == pytest.approx(float((logits_RTV.log_softmax(-1)[0, [0, 1, 2], [0, 1, 4]]).sum()))


def test_a_broken_model_hits_nothing(trio: Trio) -> None:
    logits_RTV = torch.zeros(1, 4, 6)
    logits_RTV[0, 1, 3] = torch.nan
    logprob, *hits = trio.scorer(top_k=(6,))._sums(logits_RTV, torch.tensor([[0, 0, 0, -100]]))[0].tolist()
    assert hits == [2, 2]
    assert math.isnan(logprob)


def test_lengths_are_a_handful() -> None:
    assert module._lengths(1024) == (32, 64, 128, 256, 512, 1024)
    assert module._lengths(100) == (32, 64, 100)
    assert module._lengths(32) == (32,)
    assert module._lengths(12) == (12,)
    assert len(module._lengths(4096)) == 8


def test_a_batch_of_short_rows_has_more_of_them(trio: Trio) -> None:
    scorer = trio.scorer(batch_size=4)
    assert [scorer.rows_in_batch(length) for length in scorer.lengths] == [6, 4]


def test_the_model_is_left_as_it_was(trio: Trio, rows: list[Row]) -> None:
    trio.ours.train()
    trio.scorer()(rows[:2])
    assert trio.ours.training
    trio.ours.eval()
    trio.scorer()(rows[:2])
    assert not trio.ours.training


def test_nothing_to_score(trio: Trio) -> None:
    assert trio.scorer()([]) == []


def test_more_than_the_vocabulary(trio: Trio) -> None:
    with pytest.raises(UserError, match="top_k 1000000"):
        trio.scorer(top_k=(1_000_000,))
