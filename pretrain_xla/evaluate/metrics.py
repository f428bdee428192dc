"""From the scores of rows to the scores of a task."""

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
    """scores: name → value. errors: name → standard error, where there is one. examples: what was found for each item."""

    scores: dict[str, float]
    errors: dict[str, float]
    examples: list[dict[str, Any]]


def choice(
    questions: Sequence[Question], scores: Sequence[Score], by: Literal["characters", "tokens"] | None
) -> Measured:
    """Share of questions whose right choice is the likeliest (the first of equals).

    Args:
        questions: in order.
        scores: of every choice of each question, in order.
        by: what acc_norm divides a choice's log-probability by. None means there is no acc_norm.
    """
    found: list[dict[str, Any]] = []
    remaining = iter(scores)
    for question in questions:
        own = list(itertools.islice(remaining, len(question.contexts)))
        logprobs = [score.logprob for score in own]
        example = {"gold": question.gold, "acc": _likeliest(logprobs)}
        if by is not None:
            sizes = question.lengths if by == "characters" else [score.count for score in own]
            example["acc_norm"] = _likeliest(
                [value / max(size, 1) for value, size in zip(logprobs, sizes, strict=True)]
            )
        found.append(example | {"logprobs": logprobs})
    names = ["acc"] if by is None else ["acc", "acc_norm"]
    values = {name: _share([example[name] == example["gold"] for example in found]) for name in names}
    return Measured(values, {name: _error(value, len(found)) for name, value in values.items()}, found)


def last_word(scores: Sequence[Score]) -> Measured:
    """Perplexity: exp of minus the mean log-probability of a word, however many tokens it has; acc: all of its tokens are the
    likeliest."""
    accuracy = _share([score.greedy for score in scores])
    perplexity = _exp(-math.fsum(score.logprob for score in scores) / len(scores))
    examples = [{"acc": int(score.greedy), "logprob": score.logprob} for score in scores]
    return Measured({"perplexity": perplexity, "acc": accuracy}, {"acc": _error(accuracy, len(scores))}, examples)


def stream(scores: Sequence[Score], top_k: Sequence[int]) -> Measured:
    """Mean loss of all scored tokens in nats, its exponential, and how often the true token was among the k likeliest."""
    count = sum(score.count for score in scores)
    loss = -math.fsum(score.logprob for score in scores) / count
    values: dict[str, float] = {"loss": loss, "perplexity": _exp(loss)}
    for index, k in enumerate(top_k):
        values[f"top_{k}_accuracy"] = sum(score.hits[index] for score in scores) / count
    examples = [{"logprob": score.logprob, "tokens": score.count} for score in scores]
    return Measured(values | {"tokens": count}, {}, examples)


def _likeliest(values: Sequence[float]) -> int | None:
    """Number of the highest; none where a broken model gave no number, which is no answer."""
    if any(map(math.isnan, values)):
        return None
    return max(range(len(values)), key=values.__getitem__)


def _share(truths: Sequence[bool]) -> float:
    return sum(truths) / len(truths)


def _error(share: float, count: int) -> float:
    """Standard error of a share, from the sample's deviation, as lm-eval has it."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)
