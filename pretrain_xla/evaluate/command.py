"""Command-line interface of `evaluate.py`: a model, tasks, and where the results go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.table import Table

from pretrain_xla.command_line import parse
from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError, out_of_memory
from pretrain_xla.evaluate.evaluation import Evaluation, Result
from pretrain_xla.evaluate.tasks import TASKS, Settings, check_task
from pretrain_xla.interop.load import LoadedModel, load_model
from pretrain_xla.model import GPT, Execution
from pretrain_xla.redact import redacted, redacted_tree
from pretrain_xla.run_folder.console import Console
from pretrain_xla.run_folder.folders import probe
from pretrain_xla.run_folder.metrics import to_json
from pretrain_xla.run_folder.report import shown
from pretrain_xla.runtime import Runtime, start
from pretrain_xla.storage.files import filesystem, is_local, remove_empty, write_atomically
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer

MEMORY = (
    "lower --batch-size, add --mixed-precision bf16, or shard the weights with --mesh-fsdp over more devices (xla); "
    "`python -m pretrain_xla preflight` says for a TPU what a model needs"
)


@dataclass(frozen=True)
class EvaluateFlags:
    """Evaluate a model: loss, perplexity, zero-shot tasks."""

    model: str
    """Run folder, checkpoints folder or one checkpoint; Hugging Face folder or file of weights; name on the Hub (gpt2)."""
    tasks: tuple[str, ...]
    """shards, wikitext, text, hellaswag, hellaswag_llmc, lambada, piqa, arc_easy, winogrande; each NAME or NAME=SOURCE, where
    SOURCE is a path, glob or URL of its file (of a folder, for shards)."""
    data_dir: str | None = None
    """Folder with the tasks' files, found by the start of their names. None means the Hugging Face Hub."""
    limit: int | None = None
    """Number of items of each task (questions, passages, windows, sequences). None means all."""
    stride: int | None = None
    """wikitext, text: tokens between the starts of windows. None means half of the model's length."""
    top_k: tuple[int, ...] = (1, 5)
    """shards, wikitext, text: the values of k for top-k accuracy."""
    batch_size: int = 8
    """Sequences of full length in a batch, over all devices. A batch of shorter sequences has more of them."""
    output: str | None = None
    """JSON file for the results, including those of each item."""
    tokenizer: str | None = None
    """Tokenizer. None means the model's own."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which checkpoint of a run."""
    mixed_precision: Literal["bf16"] | None = None
    """Compute in this type. None means fp32."""
    runtime: Literal["xla", "torch"] | None = None
    """None means xla if PJRT_DEVICE is set, else torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """torch runtime: device."""
    mesh_fsdp: int = 1
    """xla: devices over which the weights are sharded; batches are split over the others."""
    mesh_tensor: int = 1
    """xla: devices over which each matrix product is split (tensor parallelism)."""


def evaluate_command(arguments: Sequence[str]) -> None:
    """Load the model, score the tasks, and print the results.

    Raises:
        UserError: no model, no such task or file, a setting out of range, or not enough memory.
    """
    flags = parse(EvaluateFlags, arguments, program="evaluate.py", command="evaluate")
    _check(flags)
    with out_of_memory(MEMORY):
        _evaluate(flags)


def _evaluate(flags: EvaluateFlags) -> None:
    loaded = load_model(flags.model, flags.checkpoint)
    runtime, model = build(
        loaded,
        runtime=flags.runtime,
        device=flags.device,
        mixed_precision=flags.mixed_precision,
        mesh=(flags.mesh_fsdp, flags.mesh_tensor),
    )
    with contextlib.closing(runtime), runtime.hosts:
        model = runtime.prepare_model(model, Execution())
        console = Console(enabled=runtime.is_main)
        if runtime.is_main:
            loaded.print_notes()
        evaluation = Evaluation(
            model,
            runtime,
            lambda: tokenizer_of(loaded, flags.tokenizer),
            flags.tasks,
            Settings(flags.data_dir, flags.limit, flags.stride),
            batch_size=flags.batch_size,
            top_k=flags.top_k,
            begins=loaded.adds_bos,
        )
        results = evaluation(console.progress)
        if runtime.is_main:
            show_results(results, loaded.where)
            counts = runtime.graph_counts()
            if counts.graphs:
                console.print(f"{sum(counts.graphs.values())} graphs compiled, {counts.compile_seconds:.0f} s")
            if flags.output is not None:
                _write(flags.output, loaded.where, results, counts.graphs)


def build(
    loaded: LoadedModel,
    *,
    runtime: str | None,
    device: str,
    mixed_precision: str | None = None,
    mesh: tuple[int, int] = (1, 1),
) -> tuple[Runtime, GPT]:
    """Start the runtime, and build the loaded model on the host.

    Args:
        loaded: the model's config and tensors.
        runtime: `xla` or `torch`. None means xla if PJRT_DEVICE is set.
        device: for torch, `auto`, `cpu` or `cuda`.
        mixed_precision: `bf16`, or none for fp32.
        mesh: for xla, devices along fsdp and tensor.

    Raises:
        UserError: the devices do not exist, or the mesh does not fit them.
    """
    tree: dict[str, Any] = {
        "model": loaded.config.model_dump() | {"dropout": 0.0},
        "train": {"mixed_precision": mixed_precision},
        "parallel": {
            "runtime": runtime or ("xla" if "PJRT_DEVICE" in os.environ else "torch"),
            "device": device,
            "mesh_fsdp": mesh[0],
            "mesh_tensor": mesh[1],
        },
    }
    config = build_config(tree, loaded.where)
    started = start(config)
    model = GPT(config.model, started.compute_dtype)
    model.load_state_dict(loaded.tensors, strict=True)
    return started, model.eval()


def tokenizer_of(loaded: LoadedModel, named: str | None) -> Tokenizer:
    """The tokenizer that the user named, or the model's own.

    Raises:
        UserError: there is neither.
    """
    name = named or loaded.tokenizer
    if name is None:
        raise UserError(f"{loaded.where} came without a tokenizer: name it with --tokenizer")
    return load_tokenizer(name)


def show_results(results: Sequence[Result], title: str) -> None:
    """Print a table with one line for each score."""
    console = RichConsole(highlight=False)
    console.print(redacted(title), markup=False, soft_wrap=True)
    table = Table()
    for heading in ("task", "score", "value", "±", "items"):
        table.add_column(heading, justify="left" if heading in ("task", "score") else "right", no_wrap=True)
    for result in results:
        for index, (name, value) in enumerate(result.scores.items()):
            error = f"{result.errors[name]:.4f}" if name in result.errors else ""
            task, items = (result.task, f"{result.items:,}") if index == 0 else ("", "")
            table.add_row(task, name, f"{value:,}" if isinstance(value, int) else shown(value), error, items)
    console.print(table)
    for result in results:
        cut = f"; {result.cut} rows lost their beginning: the model is shorter" if result.cut else ""
        line = f"{result.task}: {result.definition}; from {result.source}{cut}"
        console.print(redacted(line), markup=False, soft_wrap=True)


def _check(flags: EvaluateFlags) -> None:
    for name in ("limit", "stride", "batch_size", "mesh_fsdp", "mesh_tensor"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if any(k < 1 for k in flags.top_k):
        raise UserError(f"--top-k {min(flags.top_k)}: use 1 or more")
    if not flags.tasks:
        raise UserError(f"--tasks needs at least one of {', '.join(TASKS)}")
    for word in flags.tasks:
        check_task(word)
    if flags.output is not None:
        fs, path = filesystem(flags.output)
        if fs.isdir(path):
            raise UserError(f"--output {flags.output} is a folder: name a file")
        _check_writable(fs, path, flags.output)


def _check_writable(fs: Any, path: str, output: str) -> None:
    """Check a local path before anything is scored; for a bucket, writing itself tells."""
    if not is_local(fs):
        return
    made: list[str] = []
    try:
        probe("--output", os.path.dirname(path) or ".", made)
    finally:
        remove_empty(made)  # a run that is refused later leaves no folders; writing creates them again


def _write(path: str, where: str, results: Sequence[Result], graphs: dict[str, int]) -> None:
    fs, root = filesystem(path)
    tree = {"model": where, "graphs": graphs, "tasks": {result.task: result.as_json() for result in results}}
    write_atomically(fs, root, [(to_json(redacted_tree(tree), indent=1) + "\n").encode()])
