"""A small model in three forms with the same weights (ours, a run of ours, transformers'), its tokenizer, and items."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.evaluate.scorer import Scorer
from pretrain_xla.interop.layouts import GPT2_LAYOUT
from pretrain_xla.interop.tensors import from_hugging_face
from pretrain_xla.model import GPT
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from tests.small_run import one_thread  # noqa: F401 (an automatic fixture)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LENGTH = 48
TEXT = """Evaluation asks a model which words it expects. A man sits on a roof, and he starts pulling up old tiles; then he
puts new ones down. [header] How to make tea [title] Boil water. [step] Pour it over the leaves, wait, and drink. Question:
What do plants need to grow? Answer: sunlight, water and air. Sarah was a better surgeon than Maria, so Maria asked her. The
trophy did not fit into the suitcase because it was too large. "Give me a minute," he said, "and I will meet you there."
Über naïve cafés — ¡olé! — 日本語 and emoji 🙂 are text as well, and so are  two  spaces, and a tab\tor two. """


@dataclass(frozen=True)
class Trio:
    """The same weights three times. run_dir: a run of ours, its tokenizer beside it."""

    ours: GPT
    theirs: Any
    run_dir: Path
    tokenizer: Tokenizer
    their_tokenizer: Any
    runtime: TorchRuntime

    def scorer(self, batch_size: int = 2, top_k: Iterable[int] = (1, 5)) -> Scorer:
        """A scorer of our model."""
        return Scorer(self.ours, self.runtime, batch_size, top_k)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """GPT-2's architecture with random weights that are large enough for clear preferences."""
    run_dir = tmp_path_factory.mktemp("trio")
    tokenizer = train_tokenizer([TEXT], 400, str(run_dir / "tokenizer"), min_frequency=1)
    # Three ids more than the tokenizer has, and a vocabulary that our model pads.
    shape = {"vocab_size": tokenizer.vocab_size + 3, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    torch.manual_seed(5)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text)
    ).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    config = _config(tokenizer.vocab_size + 3, str(run_dir / "tokenizer"))
    ours = GPT(config.model)
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), config.model, GPT2_LAYOUT, "test"))
    store = CheckpointStore(str(run_dir / "checkpoints"), limit=1)
    tensors = {f"model.{name}": value.detach() for name, value in ours.named_parameters()}
    store.save(tensors, CheckpointInfo(1, 1.0, "data", config.model_dump(mode="json")))
    store.close()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(run_dir / "tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    found = load_tokenizer(str(run_dir / "tokenizer"))
    return Trio(ours.eval(), theirs, run_dir, found, fast, TorchRuntime(config))


def _config(vocab_size: int, tokenizer: str) -> RunConfig:
    model = {
        "vocab_size": vocab_size,
        "seq_length": LENGTH,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "d_ff": 128,
    }
    tree = {
        "model": model | {"tie_weights": True},
        "data": {"tokenizer": tokenizer},
        "parallel": {"runtime": "torch", "device": "cpu"},
    }
    return build_config(tree, "test")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSON lines, packed where the name says so."""

    def write(name: str, records: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


ORIGINAL: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "activity_label": "Roof shingle removal",
            "endings": ["drinks tea.", "is ripping level tiles off.", "holds a  cube.", "starts pulling up old tiles."],
            "label": "3",
        },
        {
            "ctx_a": "[header] How to make tea [title] Boil water. [step] Pour it over the leaves.",
            "ctx_b": "",
            "ctx": "[header] How to make tea [title] Boil water. [step] Pour it over the leaves.",
            "activity_label": "Food and Entertaining",
            "endings": ["Wait, [substeps] and drink.", "  Sit on a roof.", "日本語 🙂", "Answer: sunlight. " * 18],
            "label": 0,
        },
        {
            "ctx_a": "Sarah was a better surgeon. " * 12,
            "ctx_b": "then Maria",
            "ctx": "Sarah was a better surgeon. " * 12 + "then Maria",
            "activity_label": "Work",
            "endings": ["asked her.", "sat.", "sat down on new tiles, and waited.", "sat down"],
            "label": 2,
        },
    ],
    "piqa": [
        {"goal": "How do I make tea?", "sol1": "Boil water, pour it.", "sol2": "Boil tiles, pour them.", "label": 0},
        {"goal": "a trophy that does not fit \n", "sol1": "large suitcase", "sol2": "small suitcase ", "label": 0},
        {"goal": "Sit down", "sol1": "On a roof, " * 9, "sol2": "On a roof.", "label": 1},
    ],
    "arc_easy": [
        {
            "id": "1",
            "question": "What do plants need to grow?",
            "choices": {"text": ["sunlight", "tea", "tiles", "a roof"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        {
            "id": "2",
            "question": "Which is largest?",
            "choices": {"text": ["a minute", "a trophy", "a suitcase"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
    ],
    "winogrande": [
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ always got the harder cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "1",
        },
        {"sentence": "The trophy did not fit as _ was too large.", "option1": "it", "option2": "a tile", "answer": "2"},
    ],
    "lambada": [
        {"text": '"Give me a minute," he said, "and I will meet you there."'},
        {"text": "A man sits on a roof.\n\nHe starts pulling up old tiles; then he puts new  ones"},
        {"text": "Sarah was a better surgeon than Maria, so Maria asked her. " * 6 + "Sarah"},
        {"text": "wait"},
    ],
}  # fmt: skip
"""Items in each dataset's own form, some with marks, some too long for the model."""


@contextlib.contextmanager
def silent(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
    """No progress line."""
    yield lambda done: None
