"""Prompts of each record format, and a clear error for a malformed record."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zstandard

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import prompts
from pretrain_xla.evaluate.prompts import Question
from pretrain_xla.evaluate.rows import cut, joined_rows, separate_rows
from pretrain_xla.evaluate.task_data import Record, find_file, read_lines, read_records
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer

from .conftest import ORIGINAL

Write = Callable[[str, Iterable[dict[str, Any]]], Path]
ASK: dict[str, Callable[[Record], Question]] = {
    "hellaswag": prompts.hellaswag,
    "hellaswag_llmc": prompts.hellaswag_llmc,
    "piqa": prompts.piqa,
    "arc_easy": prompts.arc,
    "winogrande": prompts.winogrande,
}


def ask(task: str, fields: dict[str, Any]) -> Question:
    return ASK[task](Record(fields, "file.jsonl:7"))


def test_hellaswag_lm_evals_way() -> None:
    question = ask("hellaswag", ORIGINAL["hellaswag"][1])
    assert question.contexts == (
        "Food and Entertaining: How to make tea. Boil water. Pour it over the leaves.",
    ) * 4  # fmt: skip
    assert question.continuations[:2] == (" Wait, and drink.", " Sit on a roof.")
    assert question.lengths[:2] == (16, 14)
    assert question.gold == 0
    short = {"query": question.contexts[0], "choices": [text[1:] for text in question.continuations], "gold": 0}
    assert ask("hellaswag", short) == question
    capital = ask("hellaswag", ORIGINAL["hellaswag"][2])
    assert capital.contexts[0].endswith("Then maria")


def test_hellaswag_llmcs_way() -> None:
    fields = ORIGINAL["hellaswag"][1]
    question = ask("hellaswag_llmc", fields)
    assert question.contexts == (fields["ctx"],) * 4
    assert question.continuations == tuple(f" {ending}" for ending in fields["endings"])


@pytest.mark.parametrize(
    "query", ["Question: Sit down\n", "Question: Sit down", "Question: Sit down\nAnswer:", "Sit down"]
)
def test_piqa(query: str) -> None:
    question = ask("piqa", {"goal": "Sit down", "sol1": "On a roof", "sol2": "on tea", "label": "1"})
    assert question == Question(("Question: Sit down\nAnswer:",) * 2, (" On a roof", " on tea"), (9, 6), 1)
    assert ask("piqa", {"query": query, "choices": ["On a roof", "on tea"], "gold": 1}) == question


def test_arc() -> None:
    fields = ORIGINAL["arc_easy"][0]
    question = ask("arc_easy", fields)
    assert question.contexts[0] == "Question: What do plants need to grow?\nAnswer:"
    assert question.gold == 0
    choices = [
        dict(zip(("label", "text"), pair, strict=True)) for pair in zip("ABCD", fields["choices"]["text"], strict=True)
    ]
    published = {"id": "1", "question": {"stem": fields["question"], "choices": choices}, "answerKey": "A"}
    assert ask("arc_easy", published) == question
    short = {"query": f"Question: {fields['question']}", "choices": fields["choices"]["text"], "gold": 0}
    assert ask("arc_easy", short) == question
    with pytest.raises(UserError, match=r"file.jsonl:7: answerKey 'E' is none of its choices"):
        ask("arc_easy", {**fields, "answerKey": "E"})


def test_winogrande() -> None:
    fields = ORIGINAL["winogrande"][0]
    question = ask("winogrande", fields)
    start = "Sarah was a much better surgeon than Maria so "
    assert question.contexts == (f"{start}Sarah", f"{start}Maria")
    assert question.continuations == (" always got the harder cases.",) * 2
    assert question.gold == 0
    short = {"context_options": list(question.contexts), "continuation": "always got the harder cases.", "gold": 0}
    assert ask("winogrande", short) == question
    with pytest.raises(UserError, match="neither 1 nor 2"):
        ask("winogrande", {**fields, "answer": ""})


def test_lambada() -> None:
    assert prompts.lambada(Record({"text": "one two\n\nthree four"}, "")) == ("one two\n\nthree", " four")
    assert prompts.lambada(Record({"text": "one"}, "")) == ("", " one")


@pytest.mark.parametrize("task", ASK)
def test_records_of_something_else(task: str) -> None:
    with pytest.raises(UserError, match=r"file.jsonl:7: unknown format: its keys are text"):
        ask(task, {"text": "a"})


@pytest.mark.parametrize(
    ("label", "message"), [("", "without their answers"), (4, "there are 4 choices"), (None, "is None")]
)
def test_items_without_answers(label: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask("hellaswag", {**ORIGINAL["hellaswag"][0], "label": label})


def test_records_from_everywhere(write: Write, tmp_path: Path) -> None:
    first = write("a-1.jsonl", [{"n": 1}, {"n": 2}])
    packed = write("a-2.jsonl.gz", [{"n": 3}])
    with fsspec.open("memory://eval/b.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"n": 4}\n\n'))

    def numbers(source: str) -> list[int]:
        return [record.fields["n"] for record in read_records(source)]

    assert numbers(str(first)) == [1, 2]
    assert numbers(str(packed)) == [3]
    assert numbers(f"{tmp_path}/a-*") == [1, 2, 3]
    assert numbers("memory://eval/b.jsonl.gz") == [4]
    (tmp_path / "c [v2]").mkdir()
    (tmp_path / "c [v2]" / "a.jsonl").symlink_to(first)
    assert numbers(f"{tmp_path}/c [v2]/a.jsonl") == numbers(f"{tmp_path}/c [v2]/*") == [1, 2]
    assert [record.where for record in read_records(str(first))] == [f"{first}:1", f"{first}:2"]
    (tmp_path / "a-1-labels.lst").write_text("1\n0\n")
    assert [record.fields["label"] for record in read_records(str(first))] == ["1", "0"]
    (tmp_path / "a-1-labels.lst").write_text("1\n")
    with pytest.raises(UserError, match="only 1 lines"):
        numbers(str(first))


def test_records_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n":\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: cannot be read: not JSON"):
        list(read_records(str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1: not a JSON object"):
        list(read_records(str(tmp_path / "b.jsonl")))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n' * 999)[:30])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_records(str(tmp_path / "c.jsonl.gz")))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_lines(str(tmp_path / "d.txt")))
    for name in ("none.jsonl", "none*.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            list(read_records(str(tmp_path / name)))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".ZST"])
def test_packed_text_that_ends_too_early_is_no_shorter_text(tmp_path: Path, suffix: str) -> None:
    """A score of the part that is there would look like a score of the text."""
    text = "".join(random.Random(0).choices("abcdefgh \n", k=100_000))
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, zstandard.compress)
    packed, path = pack(text.encode()), tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed)
    assert "".join(read_lines(str(path))) == text
    for kept in (len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:kept])
        with pytest.raises(UserError, match=r"a\.txt.*: cannot be read: "):
            list(read_lines(str(path)))


def test_finding_a_tasks_file(tmp_path: Path) -> None:
    for name in (
        "hellaswag_train.jsonl",
        "hellaswag_val.jsonl.gz",
        "ARC-Easy-Test.jsonl",
        "piqa1.jsonl",
        "piqa2.jsonl",
    ):
        (tmp_path / name).write_text("")
    folder = str(tmp_path)
    assert find_file(folder, "hellaswag", "val") == f"{folder}/hellaswag_val.jsonl.gz"
    assert find_file(folder, "arc_easy", "tes") == f"{folder}/ARC-Easy-Test.jsonl"
    with pytest.raises(UserError, match="several files begin with piqa"):
        find_file(folder, "piqa", "val")
    with pytest.raises(UserError, match="no file begins with lambada"):
        find_file(folder, "lambada", "tes")
    with pytest.raises(UserError, match="no such folder"):
        find_file(folder + "/none", "lambada", "tes")


def test_rows_of_pairs() -> None:
    tokenizer = BytesTokenizer()
    context, continuation = ["ab ", "", "ab"], ["c", "d", " e"]
    joined = joined_rows(context, continuation, tokenizer, 20)
    assert [(bytes(row.tokens[1:].tolist()), row.start) for row in joined] == [(b"b c", 2), (b"d", 1), (b"b e", 2)]
    assert joined[1].tokens[0] == tokenizer.end_of_text
    separate = separate_rows(context[2:], continuation[2:], tokenizer, 20)
    assert separate[0].tokens.tolist() == joined[2].tokens.tolist()


def test_an_empty_context_is_an_end_of_text() -> None:
    tokenizer = BytesTokenizer()
    (row,) = separate_rows([""], ["a"], tokenizer, 20)
    assert (row.tokens.tolist(), row.start) == ([tokenizer.end_of_text, 97], 1)


@pytest.mark.parametrize(
    ("ask", "fields"),
    [
        (prompts.hellaswag, {"query": 3, "choices": ["a", "b"], "gold": 0}),
        (prompts.hellaswag, {"query": "a", "choices": "runs", "gold": 0}),
        (prompts.hellaswag, {"ctx_a": "a", "ctx_b": None, "activity_label": "c", "endings": ["d"], "label": 0}),
        (prompts.hellaswag_llmc, {"ctx": "a", "endings": None, "label": 0}),
        (prompts.piqa, {"goal": "a", "sol1": 1, "sol2": "b", "label": 0}),
        (prompts.arc, {"question": "a", "choices": {"text": ["b"]}, "answerKey": "A"}),
        (prompts.arc, {"question": {"stem": "a", "choices": [{"text": "b"}]}, "answerKey": "A"}),
        (prompts.winogrande, {"sentence": 3, "option1": "a", "option2": "b", "answer": "1"}),
        (prompts.lambada, {"text": None}),
    ],
)
def test_values_of_another_form_name_the_record(ask: Callable[[Record], Any], fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^file:7: one of its values has the wrong type"):
        ask(Record(fields, "file:7"))


def test_what_is_too_long_loses_its_beginning() -> None:
    row = cut(range(10), 6, 7)
    assert (row.tokens.tolist(), row.start, row.lost) == (list(range(2, 10)), 4, 2)
    row = cut(range(10), 2, 7)  # a choice longer than the model: its last tokens, all but one of which have context
    assert (row.tokens.tolist(), row.start, row.lost) == (list(range(2, 10)), 1, 2)
    assert row.count == 7
    assert cut(range(8), 3, 7).lost == 0
    assert row.tokens.dtype == np.int32
