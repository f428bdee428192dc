"""Perplexity by stride compared with a short loop of transformers, and which tokens its windows score."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import Evaluation, Settings
from pretrain_xla.evaluate.evaluation import Result
from pretrain_xla.evaluate.rows import windows

from .conftest import LENGTH, SHARED, Trio, silent

SLICE = 6_000


def their_perplexity(trio: Trio, text: str, stride: int, *, recipe: bool) -> float:
    """Hugging Face's recipe (https://huggingface.co/docs/transformers/perplexity), or the same with exact counts.

    The recipe takes one token too few for the weight of every window but the first.
    """
    ids_1N = torch.tensor([trio.their_tokenizer.encode(text)])
    total, count, seen = 0.0, 0, 0
    for begin in range(0, ids_1N.shape[1], stride):
        end = min(begin + LENGTH, ids_1N.shape[1])
        window_1T = ids_1N[:, begin:end]
        targets_1T = window_1T.clone()
        targets_1T[:, : -(end - seen)] = -100
        scored = int((targets_1T[:, 1:] != -100).sum())
        weight = int((targets_1T != -100).sum()) - 1 if recipe else scored
        with torch.no_grad():
            total += float(trio.theirs(window_1T, labels=targets_1T).loss) * weight
        count += weight
        seen = end
        if end == ids_1N.shape[1]:
            break
    return math.exp(total / count)


def our_result(trio: Trio, word: str, **settings: int) -> Result:
    return Evaluation(
        trio.ours, trio.runtime, lambda: trio.tokenizer, [word], Settings(**settings), batch_size=4, top_k=(1, 5)
    )(silent)[0]


@pytest.fixture(scope="module")
def wiki() -> str:
    path = SHARED / "text" / "en" / "wiki.test.raw"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path.read_text(encoding="utf-8")[:SLICE]


@pytest.mark.parametrize("stride", [LENGTH // 2, LENGTH, 17])
def test_on_wikitext_2(stride: int, trio: Trio, wiki: str, tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(wiki, encoding="utf-8")
    # The rows of the Hub's dataset, as the recipe joins them.
    rows = [line if line.strip() else "" for line in wiki.splitlines(keepends=True)]
    text = "\n\n".join(rows)
    ours = our_result(trio, f"wikitext={tmp_path / 'wiki.test.raw'}", stride=stride)
    exact = their_perplexity(trio, text, stride, recipe=False)
    assert ours.scores["perplexity"] == pytest.approx(exact, rel=1e-5)
    if stride == LENGTH // 2:
        assert ours.scores["perplexity"] == pytest.approx(their_perplexity(trio, text, stride, recipe=True), rel=1e-4)
        plain = our_result(trio, f"text={tmp_path / 'wiki.test.raw'}")  # the stride that is taken when none is named
        assert plain.scores["perplexity"] == pytest.approx(their_perplexity(trio, wiki, stride, recipe=False), rel=1e-5)
        assert plain.scores["perplexity"] != pytest.approx(exact, rel=1e-3)  # the rows are joined by blank lines


def test_top_k_accuracy(trio: Trio, tmp_path: Path) -> None:
    text = "A man sits on a roof, and he starts pulling up old tiles; then he puts new ones down."
    (tmp_path / "a.txt").write_text(text)
    scores = our_result(trio, f"text={tmp_path / 'a.txt'}").scores
    ids_N = torch.tensor(trio.tokenizer.encode(text))
    assert len(ids_N) <= LENGTH
    with torch.no_grad():
        order_NV = trio.theirs(ids_N[None]).logits[0].argsort(-1, descending=True)
    for k in (1, 5):
        hits = [int(token) in order_NV[index, :k].tolist() for index, token in enumerate(ids_N[1:])]
        assert scores[f"top_{k}_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert scores["tokens"] == len(ids_N) - 1
    assert 0 < scores["top_1_accuracy"] + scores["top_5_accuracy"] < 2


def test_a_stride_longer_than_the_model(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to score")
    with pytest.raises(UserError, match=f"stride {LENGTH + 1} is longer than the model's {LENGTH}"):
        our_result(trio, f"text={tmp_path / 'a.txt'}", stride=LENGTH + 1)


def test_a_text_of_one_token(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="1 tokens are too few"):
        our_result(trio, f"text={tmp_path / 'a.txt'}")


@given(st.integers(2, 200), st.integers(2, 32), st.data())
def test_windows_score_every_token_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(count)
    scored: list[int] = []
    for row in windows(tokens, length, stride):
        assert len(row.tokens) <= length
        assert 1 <= row.start < len(row.tokens)
        new = row.tokens[row.start :].tolist()
        if scored:
            assert row.start >= min(length - stride, new[0]) or row.start == 1
        scored += new
    expected = [token for token in range(1, count) if stride < length or token % length]
    assert scored == expected
