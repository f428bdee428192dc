"""Command-line interface of `evaluate.py`: the table, the JSON file, and errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch

from pretrain_xla.cli import main
from pretrain_xla.evaluate.lm_eval_command import lm_eval_command
from pretrain_xla.interop.command import write_run
from pretrain_xla.interop.load import LoadedModel, load_model

from .conftest import ORIGINAL, Trio

HERE = ["--runtime", "torch", "--device", "cpu"]
WORDS = "piqa hellaswag hellaswag_llmc winogrande arc_easy lambada"


@pytest.fixture
def data(write: Callable[..., Path]) -> Path:
    """A folder with every task's file."""
    for name, items in ORIGINAL.items():
        folder = write(f"{name}.jsonl", items).parent
    return folder


def test_all_tasks_of_a_folder(trio: Trio, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "a.txt").write_text("A man sits on a roof, and he starts pulling up old tiles. " * 6)
    output = data / "results" / "out.json"
    words = [*WORDS.split(), f"text={data}/a.txt"]
    main(
        [
            "evaluate",
            "--model",
            str(trio.run_dir),
            "--tasks",
            *words,
            "--data-dir",
            str(data),
            "--output",
            str(output),
            *HERE,
        ]
    )
    printed = capsys.readouterr().out
    for part in (*words[:-1], "text", "acc_norm", "perplexity", "top_5_accuracy", "llm.c's", "its beginning"):
        assert part in printed.replace("lost their beginning", "its beginning")
    found = json.loads(output.read_text())["tasks"]
    assert list(found) == [*words[:-1], "text"]
    assert found["hellaswag"]["items"] == len(ORIGINAL["hellaswag"])
    assert found["hellaswag"]["cut"] > 0
    assert len(found["hellaswag"]["examples"][0]["logprobs"]) == 4
    main(["evaluate", "--model", str(trio.run_dir), "--tasks", "piqa", "--data-dir", str(data), "--limit", "1", *HERE])
    assert " 1 │" in capsys.readouterr().out


def test_a_broken_model_scores_nothing(trio: Trio, data: Path) -> None:
    # Every weight is a number, and none of what is computed with them.
    tensors = {name: torch.full_like(value, 3e38) for name, value in trio.ours.state_dict().items()}
    (data / "run").mkdir()
    write_run(
        LoadedModel(trio.ours.config, tensors, load_model(str(trio.run_dir)).tokenizer, "test"), str(data / "run")
    )
    (data / "a.txt").write_text("A man sits on a roof, and he starts pulling up old tiles. ")
    words = ["piqa", "lambada", f"text={data}/a.txt", "--data-dir", str(data), "--output", str(data / "out.json")]
    main(["evaluate", "--model", str(data / "run"), "--tasks", *words, *HERE])
    found = json.loads((data / "out.json").read_text(), parse_constant=pytest.fail)["tasks"]
    assert found["piqa"]["scores"] == {"acc": 0, "acc_norm": 0}
    assert found["lambada"]["scores"] == {"perplexity": None, "acc": 0}
    assert found["text"]["scores"]["loss"] is None
    assert found["text"]["scores"]["top_5_accuracy"] == 0


def test_llmcs_way_counts_by_tokens(trio: Trio, data: Path) -> None:
    output = data / "out.json"
    words = ["hellaswag_llmc", "--data-dir", str(data), "--output", str(output)]
    main(["evaluate", "--model", str(trio.run_dir), "--tasks", *words, *HERE])
    for example, item in zip(
        json.loads(output.read_text())["tasks"]["hellaswag_llmc"]["examples"], ORIGINAL["hellaswag"], strict=True
    ):
        counts = [min(len(trio.tokenizer.encode(f" {ending}")), 48) for ending in item["endings"]]
        losses = [-logprob for logprob in example["logprobs"]]
        assert example["acc"] == losses.index(min(losses))
        means = [loss / count for loss, count in zip(losses, counts, strict=True)]
        assert example["acc_norm"] == means.index(min(means))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments, *HERE])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_faults_end_in_one_line(trio: Trio, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(trio.run_dir), "--tasks"]
    assert "did you mean 'hellaswag'" in refusal(capsys, *model, "helaswag")
    assert "no such file" in refusal(capsys, *model, f"piqa={data}/none.jsonl")
    assert "text needs a file: text=FILE" in refusal(capsys, *model, "text")
    assert "shards needs a folder" in refusal(capsys, *model, "shards")
    assert "named twice" in refusal(capsys, *model, "piqa", f"piqa={data}/piqa.jsonl", "--data-dir", str(data))
    assert "--limit 0" in refusal(capsys, *model, "piqa", "--limit", "0")
    assert "--top-k 0" in refusal(capsys, *model, "piqa", "--top-k", "0")
    (data / "file").write_text("in the way")
    assert "cannot be written" in refusal(
        capsys, "--model", "none", "--tasks", "piqa", "--output", f"{data}/file/x.json"
    )
    assert "is a folder" in refusal(capsys, *model, "piqa", "--output", str(data))
    assert "it is not the model's" in refusal(
        capsys, *model, "piqa", "--data-dir", str(data), "--tokenizer", str(_larger_tokenizer(data))
    )
    assert "none" in refusal(capsys, "--model", str(data / "none"), "--tasks", "piqa")


def test_offline_the_hub_is_a_clear_word(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # What the environment variable HF_HUB_OFFLINE sets, which is read when these modules are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = refusal(capsys, "--model", str(trio.run_dir), "--tasks", "hellaswag")
    assert "Rowan/hellaswag cannot be loaded from the Hugging Face Hub" in said
    assert "hellaswag=FILE" in said


def test_lm_evals_command_line(
    trio: Trio, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    (data / "task.yaml").write_text(
        f"include: {Path(lm_eval.__file__).parent}/tasks/piqa/piqa.yaml\ntask: local_piqa\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {data}/piqa.jsonl}}, cache_dir: {data}}}\ntraining_split: null\n"
    )
    model = ["--model_args", f"pretrained={trio.run_dir},runtime=torch", "--device", "cpu"]
    lm_eval_command([*model, "--tasks", "local_piqa", "--include_path", str(data), "--limit", "2"])
    printed = capsys.readouterr().out
    assert "pretrain_xla (" in printed
    assert "|local_piqa|" in printed
    assert "acc_norm" in printed


@pytest.mark.parametrize(
    ("words", "names_ours"),
    [
        ("run --tasks piqa", True),
        ("--tasks piqa", True),
        ("validate --tasks piqa", False),
        ("ls tasks", False),
        ("run --model hf", False),
        ("run --config theirs.yaml", False),
        ("--config=ours.yaml", True),
        ("--config none.yaml", True),
    ],
)
def test_our_model_is_named_where_none_is(
    words: str, names_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = pytest.importorskip("lm_eval.__main__", reason="lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(program, "cli_evaluate", lambda: None)
    Path("theirs.yaml").write_text("model: hf\n")
    Path("ours.yaml").write_text("tasks: [piqa]\n")
    lm_eval_command(words.split())
    assert sys.argv == ["lm_eval", *words.split(), *(["--model", "pretrain_xla"] if names_ours else [])]


def _larger_tokenizer(folder: Path) -> Path:
    from pretrain_xla.tokenizers.train import train_tokenizer

    train_tokenizer(["".join(f"{n * 7919} " for n in range(3000))], 800, str(folder / "larger"), min_frequency=1)
    return folder / "larger"
