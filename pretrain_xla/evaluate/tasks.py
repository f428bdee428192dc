"""The evaluation tasks: the data, prompts and metrics of each, and whose definition it follows. Add a task to `TASKS`."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import TokenDataset, open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import metrics, prompts
from pretrain_xla.evaluate.metrics import Measured
from pretrain_xla.evaluate.prompts import Question
from pretrain_xla.evaluate.rows import joined_rows, separate_rows, windows
from pretrain_xla.evaluate.scorer import Row, Score
from pretrain_xla.evaluate.task_data import HubDataset, Record, find_file, read_hub, read_lines, read_records
from pretrain_xla.interop.special_tokens import before_text
from pretrain_xla.tokenizers.fingerprint import TokenizerId, dataset_tokenizer, fingerprint
from pretrain_xla.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Options of an evaluation.

    data_dir: folder with the tasks' files; None means the Hub. limit: items of each task; None means all. stride: tokens
    between windows of text; None means half of the model's length. shards: default folder of the task `shards`.
    """

    data_dir: str | None = None
    limit: int | None = None
    stride: int | None = None
    shards: str | None = None


@dataclass(frozen=True)
class Reader:
    """How a model reads text.

    load_tokenizer: returns its tokenizer; called only for tasks with text, and for shards whose tokenizer is known.
    max_length: its `seq_length`. vocab_size: its number of ids. top_k: each k of the top-k accuracies.
    begins: see `LoadedModel.adds_bos`.
    """

    load_tokenizer: Callable[[], Tokenizer]
    max_length: int
    vocab_size: int
    top_k: tuple[int, ...]
    begins: bool = False

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Ids that the model expects before every text."""
        return before_text(self.tokenizer) if self.begins else ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            UserError: there is none, or it has more ids than the model.
        """
        tokenizer = self.load_tokenizer()
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and the model {self.vocab_size}: "
                "it is not the model's; name the right one with --tokenizer"
            )
        return tokenizer


@dataclass(frozen=True)
class Prepared:
    """A task that has been read: rows to score, and how their scores become the task's.

    source: where its items came from. items: how many.
    """

    name: str
    definition: str
    source: str
    items: int
    rows: Sequence[Row]
    measure: Callable[[Sequence[Score]], Measured]


@dataclass(frozen=True)
class Task:
    """A kind of evaluation.

    definition: what is scored and how, in a sentence. prepare: reads it. hub: its default dataset. stem: how the names of its
    files start. options: for `prepare`.
    """

    definition: str
    prepare: Callable[[TaskRequest], Prepared]
    hub: HubDataset | None = None
    stem: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRequest:
    """A task to prepare for a model. source: path, glob or URL that the user named, if any."""

    name: str
    task: Task
    source: str | None
    settings: Settings
    reader: Reader


def prepare_task(word: str, settings: Settings, reader: Reader) -> Prepared:
    """Read a task.

    Args:
        word: `NAME`, or `NAME=SOURCE` with a path, glob or fsspec URL.
        settings: other options.
        reader: of the model.

    Raises:
        UserError: no such task, no such file, or malformed items.
    """
    name = check_task(word)
    source = word.partition("=")[2]
    return TASKS[name].prepare(TaskRequest(name, TASKS[name], source or None, settings, reader))


def check_task(word: str) -> str:
    """The name in `NAME` or `NAME=SOURCE`; called before the model is loaded, which may take long.

    Raises:
        UserError: there is no such task.
    """
    name = word.partition("=")[0]
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        raise UserError(
            f"unknown task {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(TASKS)}")
        )
    return name


def _records(request: TaskRequest) -> tuple[str, list[Record]]:
    """Source of a task's items, and the first `limit` of them."""
    hub = request.task.hub
    assert hub is not None
    source = _source(request)
    found = read_records(source) if source is not None else read_hub(hub, request.name)
    where = source or str(hub)
    records = list(itertools.islice(found, request.settings.limit))
    if not records:
        raise UserError(f"{where}: no items in it")
    return where, records


def _source(request: TaskRequest) -> str | None:
    """The file that was named, or that is in the folder of evaluation data, or None for the Hub."""
    hub, folder = request.task.hub, request.settings.data_dir
    if request.source is None and folder is not None and hub is not None:
        return find_file(folder, request.task.stem, hub.split[:3])
    return request.source


def _choice(request: TaskRequest) -> Prepared:
    reader, options = request.reader, request.task.options
    where, records = _records(request)
    questions: list[Question] = [options["prompt"](record) for record in records]
    contexts = [context for question in questions for context in question.contexts]
    continuations = [continuation for question in questions for continuation in question.continuations]
    if options.get("separate"):
        rows = separate_rows(contexts, continuations, reader.tokenizer, reader.max_length)
    else:
        rows = joined_rows(contexts, continuations, reader.tokenizer, reader.max_length, reader.before)

    def measure(scores: Sequence[Score]) -> Measured:
        return metrics.choice(questions, scores, by=options["by"])

    return Prepared(request.name, request.task.definition, where, len(questions), rows, measure)


def _last_word(request: TaskRequest) -> Prepared:
    reader = request.reader
    where, records = _records(request)
    pairs = [prompts.lambada(record) for record in records]
    rows = joined_rows([a for a, _ in pairs], [b for _, b in pairs], reader.tokenizer, reader.max_length, reader.before)
    return Prepared(request.name, request.task.definition, where, len(pairs), rows, metrics.last_word)


def _text(request: TaskRequest) -> Prepared:
    reader, settings = request.reader, request.settings
    stride = settings.stride or max(reader.max_length // 2, 1)
    if stride > reader.max_length:
        raise UserError(
            f"stride {stride} is longer than the model's {reader.max_length} tokens, and would leave out some: "
            f"use {reader.max_length} or less"
        )
    where, text = _read_text(request)
    tokens = np.array([*reader.before, *reader.tokenizer.encode(text)], np.int32)
    rows = list(itertools.islice(windows(tokens, reader.max_length, stride), settings.limit))
    if not rows:
        raise UserError(f"{where}: {len(tokens)} tokens are too few to score one")

    def measure(scores: Sequence[Score]) -> Measured:
        return metrics.stream(scores, reader.top_k)

    definition = f"{request.task.definition} (windows of {reader.max_length} tokens, stride {stride})"
    return Prepared(request.name, definition, where, len(rows), rows, measure)


def _read_text(request: TaskRequest) -> tuple[str, str]:
    name, hub, source = request.name, request.task.hub, _source(request)
    if source is None and hub is None:
        raise UserError(f"task {name} needs a file: {name}=FILE")
    lines: Iterable[str]
    if source is None:
        assert hub is not None
        lines = (record.fields["text"] for record in read_hub(hub, name))
    else:
        lines = read_lines(source)
    if request.task.options.get("rows"):
        # As in the Hub's dataset: each line with its end is a row, and a blank line is an empty row.
        return source or str(hub), "\n\n".join(line if line.strip() else "" for line in lines)
    return source or str(hub), "".join(lines)


def _shards(request: TaskRequest) -> Prepared:
    name, settings, reader = request.name, request.settings, request.reader
    folder = request.source or settings.shards
    if folder is None:
        raise UserError(f"task {name} needs a folder of token shards: {name}=FOLDER")
    dataset = open_dataset(folder, reader.max_length, reader.vocab_size, split="valid")
    _check_made_with(dataset, folder, reader)
    batches = Batches(dataset, sequences_per_batch=1, seq_length=reader.max_length, seed=0, shuffle=False)
    count = min(settings.limit or batches.sequences_per_epoch, batches.sequences_per_epoch)
    rows = [Row(batches.rows(index)[0], 1) for index in range(count)]

    def measure(scores: Sequence[Score]) -> Measured:
        return metrics.stream(scores, reader.top_k)

    return Prepared(name, request.task.definition, folder, count, rows, measure)


def _check_made_with(dataset: TokenDataset, folder: str, reader: Reader) -> None:
    """Refuse shards made with another tokenizer than the model's, if both are known: their loss would be meaningless."""
    made = dataset_tokenizer(dataset.info)
    if made == TokenizerId():
        return
    try:
        own = TokenizerId(fingerprint(reader.tokenizer), reader.tokenizer.name)
    except UserError:  # the model has none
        return
    if own.differs(made):
        raise UserError(
            f"{folder}: was made with another tokenizer than the model's ({own.name}): the same ids mean other text there; "
            "prepare it with that, or name the model's right one with --tokenizer"
        )


_LM_EVAL = "lm-eval's task of that name"
TASKS: dict[str, Task] = {
    "shards": Task("mean loss over every token of the sequences of token shards", _shards),
    "wikitext": Task(
        "perplexity of WikiText-2's rows joined by blank lines, Hugging Face's recipe",
        _text, HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "wiki", {"rows": True},
    ),
    "text": Task("perplexity of a text file as it stands", _text),
    "hellaswag": Task(
        f"{_LM_EVAL}: acc by summed log-probability, acc_norm by that for each character", _choice,
        HubDataset("Rowan/hellaswag", None, "validation"), "hellaswag", {"prompt": prompts.hellaswag, "by": "characters"},
    ),
    "hellaswag_llmc": Task(
        "llm.c's: raw context and ending, tokenized apart; acc by summed loss, acc_norm by mean loss for each token", _choice,
        HubDataset("Rowan/hellaswag", None, "validation"), "hellaswag",
        {"prompt": prompts.hellaswag_llmc, "by": "tokens", "separate": True},
    ),
    "lambada": Task(
        "lm-eval's lambada_openai: perplexity of the last word, acc by greedy decoding", _last_word,
        HubDataset("EleutherAI/lambada_openai", "default", "test"), "lambada",
    ),
    "piqa": Task(
        f"{_LM_EVAL}: acc by summed log-probability, acc_norm by that for each character", _choice,
        HubDataset("baber/piqa", None, "validation"), "piqa", {"prompt": prompts.piqa, "by": "characters"},
    ),
    "arc_easy": Task(
        f"{_LM_EVAL}: acc by summed log-probability, acc_norm by that for each character", _choice,
        HubDataset("allenai/ai2_arc", "ARC-Easy", "test"), "arc_easy", {"prompt": prompts.arc, "by": "characters"},
    ),
    "winogrande": Task(
        f"{_LM_EVAL}: acc by the log-probability of what follows the gap, given each filling", _choice,
        HubDataset("allenai/winogrande", "winogrande_xl", "validation"), "winogrande",
        {"prompt": prompts.winogrande, "by": None},
    ),
}  # fmt: skip
"""Name → task."""
