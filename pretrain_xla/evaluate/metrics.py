"""Metrics of a task from the scores of its rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain_xla.evaluate.prompts import Question
from pretrain_xla.evaluate.scorer import Score


@dataclass(frozen=True)
class Measured:
    """scores: name → value. errors: name → standard error, if there is one. examples: results of each item."""

    scores: dict[str, float]
    errors: dict[str, float]
    examples: list[dict[str, Any]]


def choice(
    questions: Sequence[Question], scores: Sequence[Score], by: Literal["characters", "tokens"] | None
) -> Measured:
    """Accuracy: fraction of questions whose right choice is the most likely one (of equals, the first).

    Args:
        questions: in order.
        scores: of all choices of each question, in order.
        by: what acc_norm divides a choice's log-probability by. None means there is no acc_norm.
    """
    found: list[dict[str, Any]] = []
    remaining = iter(scores)
    for question in questions:
        own = list(itertools.islice(remaining, len(question.contexts)))
        logprobs = [score.logprob for score in own]
        example = {"gold": question.gold, "acc": _most_likely(logprobs)}
        if by is not None:
            sizes = question.lengths if by == "characters" else [score.count for score in own]
            example["acc_norm"] = _most_likely(
                [value / max(size, 1) for value, size in zip(logprobs, sizes, strict=True)]
            )
        found.append(example | {"logprobs": logprobs})
    names = ["acc"] if by is None else ["acc", "acc_norm"]
    values = {name: _share([example[name] == example["gold"] for example in found]) for name in names}
    return Measured(values, {name: _error(value, len(found)) for name, value in values.items()}, found)


def last_word(scores: Sequence[Score]) -> Measured:
    """perplexity: exp of minus the mean log-probability of a word, whatever its number of tokens. acc: fraction of words of
    which every token is the most likely one."""
    accuracy = _share([score.greedy for score in scores])
    perplexity = _exp(-math.fsum(score.logprob for score in scores) / len(scores))
    examples = [{"acc": int(score.greedy), "logprob": score.logprob} for score in scores]
    return Measured({"perplexity": perplexity, "acc": accuracy}, {"acc": _error(accuracy, len(scores))}, examples)


def stream(scores: Sequence[Score], top_k: Sequence[int]) -> Measured:
    """Mean loss of the scored tokens in nats, perplexity, and how often the true token is among the k most likely."""
    count = sum(score.count for score in scores)
    loss = -math.fsum(score.logprob for score in scores) / count
    values: dict[str, float] = {"loss": loss, "perplexity": _exp(loss)}
    for index, k in enumerate(top_k):
        values[f"top_{k}_accuracy"] = sum(score.hits[index] for score in scores) / count
    examples = [{"logprob": score.logprob, "tokens": score.count} for score in scores]
    return Measured(values | {"tokens": count}, {}, examples)


def _most_likely(values: Sequence[float]) -> int | None:
    """Index of the highest value, or None if a broken model gave NaN, which counts as wrong."""
    if any(map(math.isnan, values)):
        return None
    return max(range(len(values)), key=values.__getitem__)


def _share(truths: Sequence[bool]) -> float:
    return sum(truths) / len(truths)


def _error(share: float, count: int) -> float:
    """Standard error of a fraction from the sample's standard deviation, as in lm-eval."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)
