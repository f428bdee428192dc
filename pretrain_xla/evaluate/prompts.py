"""Prompts of the zero-shot tasks: from a record, in any of its usual formats, to the strings that a model is given.

The format is recognised by the record's keys: the dataset's own, or the short one that other trainers use (`query`, `choices`,
`gold`). Both give the same strings, exactly those of lm-eval's tasks of the same names; only `hellaswag_llmc` is llm.c's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.task_data import Record


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: a choice between continuations, or between contexts of one continuation.

    contexts, continuations: one of each for every choice. lengths: characters of each choice, the divisor of lm-eval's
    acc_norm. gold: index of the right one.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


Prompt = TypeVar("Prompt", Question, tuple[str, str])
LISTS = ("endings", "choices", "context_options")


def checked(prompt: Callable[[Record], Prompt]) -> Callable[[Record], Prompt]:
    """Decorator: values of a wrong type, and texts in place of lists, become a `UserError` that names the record."""

    @functools.wraps(prompt)
    def call(record: Record) -> Prompt:
        try:
            if any(isinstance(record.fields.get(key), str) for key in LISTS):
                raise TypeError("a text in place of a list")
            made = prompt(record)
            texts = made.contexts if isinstance(made, Question) else made
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("not a text")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{record.where}: one of its values has the wrong type ({' '.join(str(error).split())})"
            ) from None
        return made

    return call


@checked
def hellaswag(record: Record) -> Question:
    """As in lm-eval: activity and context first, without WikiHow's bracketed marks."""
    kind = _format(record, {"endings", "ctx_a", "ctx_b", "activity_label"}, {"query", "choices"})
    if kind == 0:
        fields = record.fields
        context = _without_marks(f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}")
        return _question(record, context, [_without_marks(ending) for ending in fields["endings"]], "label")
    return _question(record, record.fields["query"], record.fields["choices"], "gold")


@checked
def hellaswag_llmc(record: Record) -> Question:
    """As in llm.c: context and endings unchanged. The short format has no `ctx`; its query is used."""
    if _format(record, {"endings", "ctx"}, {"query", "choices"}) == 0:
        return _question(record, record.fields["ctx"], record.fields["endings"], "label")
    return _question(record, record.fields["query"], record.fields["choices"], "gold")


@checked
def piqa(record: Record) -> Question:
    """A goal and two solutions."""
    if _format(record, {"goal", "sol1", "sol2"}, {"query", "choices"}) == 0:
        fields = record.fields
        return _question(record, _qa_prompt(fields["goal"]), [fields["sol1"], fields["sol2"]], "label")
    return _question(record, _short_prompt(record), record.fields["choices"], "gold")


@checked
def arc(record: Record) -> Question:
    """A science question with three to five answers."""
    if _format(record, {"question", "answerKey"}, {"query", "choices"}) == 1:
        return _question(record, _short_prompt(record), record.fields["choices"], "gold")
    question, choices = record.fields["question"], record.fields.get("choices")
    if isinstance(question, dict):  # AI2's own files; the Hub's dataset has columns
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    if not isinstance(choices, dict) or record.fields["answerKey"] not in choices["label"]:
        raise UserError(f"{record.where}: answerKey {record.fields['answerKey']!r} is none of its choices")
    gold = choices["label"].index(record.fields["answerKey"])
    return _choices(_qa_prompt(question), choices["text"], gold)


@checked
def winogrande(record: Record) -> Question:
    """A sentence with a gap: for each option that fills it, the rest of the sentence is scored (Trinh and Le 2018)."""
    fields = record.fields
    if _format(record, {"sentence", "option1", "option2", "answer"}, {"context_options", "continuation"}) == 0:
        if "_" not in fields["sentence"] or str(fields["answer"]) not in ("1", "2"):
            raise UserError(f"{record.where}: its sentence has no gap `_`, or its answer is neither 1 nor 2")
        before, after = fields["sentence"].split("_", 1)
        contexts, gold = [before + fields["option1"], before + fields["option2"]], int(fields["answer"]) - 1
        rest = after.strip()
    else:
        contexts, rest = fields["context_options"], fields["continuation"]
        gold = _number(record, "gold", len(contexts))
    lengths = tuple(len(context) for context in contexts)
    return Question(tuple(contexts), (f" {rest}",) * len(contexts), lengths, gold)


@checked
def lambada(record: Record) -> tuple[str, str]:
    """A passage without its last word, and that word."""
    _format(record, {"text"})
    passage, _, word = record.fields["text"].rpartition(" ")
    return passage, f" {word}"


def _format(record: Record, *formats: set[str]) -> int:
    """Index of the first format whose keys are all in the record.

    Raises:
        UserError: there is no such format.
    """
    for index, keys in enumerate(formats):
        if keys <= record.fields.keys():
            return index
    known = " nor ".join(", ".join(sorted(keys)) for keys in formats)
    found = ", ".join(record.fields)
    raise UserError(f"{record.where}: unknown format: its keys are {found}, and neither {known} are all among them")


def _question(record: Record, context: str, choices: list[str], label: str) -> Question:
    return _choices(context, choices, _number(record, label, len(choices)))


def _choices(context: str, choices: list[str], gold: int) -> Question:
    continuations = tuple(f" {choice}" for choice in choices)
    return Question((context,) * len(choices), continuations, tuple(map(len, choices)), gold)


def _number(record: Record, key: str, count: int) -> int:
    value: Any = record.fields.get(key)
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise UserError(
            f"{record.where}: {key} is {value!r}: the items of a test set come without their answers"
        ) from None
    if not 0 <= number < count:
        raise UserError(f"{record.where}: {key} is {number}, and there are {count} choices")
    return number


def _qa_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _short_prompt(record: Record) -> str:
    """The prompt of the short format, whose query may already contain `Question:` and `Answer:`."""
    return _qa_prompt(record.fields["query"].removeprefix("Question: ").removesuffix("\nAnswer:").removesuffix("\n"))


def _without_marks(text: str) -> str:
    """Remove the bracketed marks of HellaSwag's WikiHow part, in lm-eval's order of replacements."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
