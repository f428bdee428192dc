"""Items of the zero-shot tasks, from any of the forms they are passed around in, to the strings that a model is given.

The form of a record is recognised by its keys: the dataset's own, or the short one in which other trainers pass items on
(`query`, `choices`, `gold`). Whatever the form, the strings are the same, and they are those of lm-eval's tasks of the same
names, to the letter; `hellaswag_llmc` alone is llm.c's.
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
    """A choice between continuations, or between contexts of one continuation.

    contexts, continuations: one of each for every choice. lengths: characters of each choice, which lm-eval's acc_norm divides
    by. gold: number of the right one.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


Asked = TypeVar("Asked", Question, tuple[str, str])
LISTS = ("endings", "choices", "context_options")


def checked(ask: Callable[[Record], Asked]) -> Callable[[Record], Asked]:
    """Values of a wrong type become a `UserError` that names the record; a text where a list should be is one."""

    @functools.wraps(ask)
    def call(record: Record) -> Asked:
        try:
            if any(isinstance(record.fields.get(key), str) for key in LISTS):
                raise TypeError("a text where a list should be")
            asked = ask(record)
            texts = asked.contexts if isinstance(asked, Question) else asked
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("no text where one should be")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{record.where}: one of its values is of another form ({' '.join(str(error).split())})"
            ) from None
        return asked

    return call


@checked
def hellaswag(record: Record) -> Question:
    """lm-eval's way: activity and context in front, WikiHow's marks taken out."""
    form = _form(record, {"endings", "ctx_a", "ctx_b", "activity_label"}, {"query", "choices"})
    if form == 0:
        fields = record.fields
        context = _without_marks(f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}")
        return _question(record, context, [_without_marks(ending) for ending in fields["endings"]], "label")
    return _question(record, record.fields["query"], record.fields["choices"], "gold")


@checked
def hellaswag_llmc(record: Record) -> Question:
    """llm.c's way: the context and the endings as they stand. (The short form has lost `ctx`: there, its query.)"""
    if _form(record, {"endings", "ctx"}, {"query", "choices"}) == 0:
        return _question(record, record.fields["ctx"], record.fields["endings"], "label")
    return _question(record, record.fields["query"], record.fields["choices"], "gold")


@checked
def piqa(record: Record) -> Question:
    """A goal, and two ways to reach it."""
    if _form(record, {"goal", "sol1", "sol2"}, {"query", "choices"}) == 0:
        fields = record.fields
        return _question(record, _asked(fields["goal"]), [fields["sol1"], fields["sol2"]], "label")
    return _question(record, _asked_in(record), record.fields["choices"], "gold")


@checked
def arc(record: Record) -> Question:
    """A science question with three to five answers."""
    if _form(record, {"question", "answerKey"}, {"query", "choices"}) == 1:
        return _question(record, _asked_in(record), record.fields["choices"], "gold")
    question, choices = record.fields["question"], record.fields.get("choices")
    if isinstance(question, dict):  # AI2's own files; the Hub's have columns
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    if not isinstance(choices, dict) or record.fields["answerKey"] not in choices["label"]:
        raise UserError(f"{record.where}: answerKey {record.fields['answerKey']!r} is none of its choices")
    gold = choices["label"].index(record.fields["answerKey"])
    return _choices(_asked(question), choices["text"], gold)


@checked
def winogrande(record: Record) -> Question:
    """A sentence with a gap: each option fills it in turn, and the rest of the sentence is scored (Trinh and Le 2018)."""
    fields = record.fields
    if _form(record, {"sentence", "option1", "option2", "answer"}, {"context_options", "continuation"}) == 0:
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
    """A passage, and its last word."""
    _form(record, {"text"})
    passage, _, word = record.fields["text"].rpartition(" ")
    return passage, f" {word}"


def _form(record: Record, *forms: set[str]) -> int:
    """Number of the first form all of whose keys the record has.

    Raises:
        UserError: none.
    """
    for index, keys in enumerate(forms):
        if keys <= record.fields.keys():
            return index
    known = " nor ".join(", ".join(sorted(keys)) for keys in forms)
    found = ", ".join(record.fields)
    raise UserError(f"{record.where}: unknown form: its keys are {found}, and neither {known} are all among them")


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


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _asked_in(record: Record) -> str:
    """The prompt of the short form, whose query may hold the words around the question already, or some of them."""
    return _asked(record.fields["query"].removeprefix("Question: ").removesuffix("\nAnswer:").removesuffix("\n"))


def _without_marks(text: str) -> str:
    """Without the bracketed marks of HellaSwag's WikiHow half, in lm-eval's order of replacements."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


Ask = Callable[[Record], Question]
