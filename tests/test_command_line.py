"""The command-line interface of every command: errors are one line, and other programs' names of a flag are recognised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pretrain_xla.command_line import flags_of
from pretrain_xla.config import LEAVES
from pretrain_xla.errors import UserError, guarded
from pretrain_xla.evaluate.command import EvaluateFlags, evaluate_command
from pretrain_xla.flag_names import OTHER_NAMES, our_name
from pretrain_xla.flags import parse_flags
from pretrain_xla.generate.command import GenerateFlags, generate_command
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.prepare.command import PrepareFlags, TrainTokenizerFlags, prepare_command, train_tokenizer_command
from pretrain_xla.prepare.inspect_command import inspect_command
from pretrain_xla.quickstart import quickstart_command
from pretrain_xla.tokenizers.bitbpe_command import convert_command

ROOT = Path(__file__).resolve().parents[1]
OURS: dict[str, set[str]] = {
    "train": {*LEAVES, "config"},
    "generate": set(typing.get_type_hints(GenerateFlags)),
    "evaluate": set(typing.get_type_hints(EvaluateFlags)),
    "prepare": set(typing.get_type_hints(PrepareFlags)),
    "train-tokenizer": set(typing.get_type_hints(TrainTokenizerFlags)),
}


def train_command(arguments: Sequence[str]) -> None:
    parse_flags(arguments, program="run_pretrain.py", description="")


@pytest.mark.parametrize("command", OTHER_NAMES)
def test_the_table_of_other_names_leads_to_existing_flags(command: str) -> None:
    ours = {flag for leaf in OURS[command] for flag in flags_of(leaf)}
    for other, here in OTHER_NAMES[command].items():
        assert f"--{other}" not in ours, f"{other} is a flag of this command"
        for flag in re.findall(r"--[a-z0-9-]+", here):
            assert flag in ours, f"{other} leads to {flag}"


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [
        (train_command, "--lr", "--learning-rate"),
        (train_command, "--batch-size", "--train-batch-size"),
        (train_command, "--block_size=1024", "--seq-length"),
        (train_command, "--max-steps", "--train-steps"),
        (train_command, "--lr-schedule", "--decay-method"),
        (train_command, "--fp16", "--mixed-precision fp16"),
        (train_command, "--per_device_train_batch_size", "--train-batch-size"),
        (train_command, "--gradient_accumulation_steps", "--gradient-accum-step"),
        (train_command, "--training.global_batch_size", "--train-batch-size"),
        (train_command, "--optimizer.lr", "--learning-rate"),
        (generate_command, "--temp", "--temperature"),
        (generate_command, "--max_len", "--max-new-tokens"),
        (evaluate_command, "--task", "--tasks"),
        (prepare_command, "--output_path", "OUTPUT-DIR"),
        (train_tokenizer_command, "--max_train_lines", "--max-lines"),
        (train_tokenizer_command, "--output_path", "--output-dir"),
    ],
)
def test_another_programs_flag_is_answered_with_ours(
    command: Callable[[Sequence[str]], object], theirs: str, ours: str
) -> None:
    with pytest.raises(UserError) as caught:
        command([theirs, "3"])
    assert str(caught.value).startswith(f"unknown argument {theirs!r}")
    assert f": use {ours}" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_name_is_not_in_the_table() -> None:
    assert our_name("train", "--d-modle") is None
    assert our_name("quickstart", "--lr") is None


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (generate_command, ["--model", "x", "--top-k", "a"], "--top-k: 'a' is not an integer"),
        (generate_command, ["--model", "x", "--temperature", "hot"], "--temperature: 'hot' is not a number"),
        (generate_command, ["--modle", "x"], "did you mean --model?"),
        (evaluate_command, ["--model", "x"], "missing: --tasks"),
        (prepare_command, ["x", "y", "--shard-size", "many"], "--shard-size: 'many' is not an integer"),
        (train_tokenizer_command, [], "missing: --source [STR [STR ...]], --output-dir STR"),
        (convert_command, ["--input_path", "x"], "missing: --output-path STR"),
        (inspect_command, [], "missing: PATH"),
        (quickstart_command, ["--lr", "3"], "unknown argument '--lr'"),
        (export_command, [], "missing: MODEL, OUT"),
        (export_command, ["a", "b", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (export_command, ["a", "b", "--dtpe", "fp8"], "unknown argument '--dtpe'; did you mean --dtype?"),
        (import_command, ["a", "b", "--num-heads", "x"], "--num-heads: invalid int value: 'x'"),
    ],
)
def test_an_error_of_any_command_is_one_line(
    command: Callable[[Sequence[str]], object], arguments: list[str], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        command(arguments)
    assert expected in str(caught.value)
    assert not set(str(caught.value)) & set("\n╭│─")


def test_help_texts_do_not_keep_the_line_breaks_of_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for command in (evaluate_command, prepare_command):
        with pytest.raises(SystemExit):
            command(["--help"])
    printed = capsys.readouterr().out
    assert "each NAME or NAME=SOURCE, where SOURCE is a path" in printed
    assert "(of ten billion tokens, that is more than any validation reads). (default: None)" in printed


def test_a_package_that_is_not_installed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def needs(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.raises(SystemExit) as caught:
        guarded(needs)("gcsfs.core")
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("error: the package gcsfs is not installed: pip install -r requirements.txt\n")
    with pytest.raises(ModuleNotFoundError):
        guarded(needs)("pretrain_xla.absent")  # a defect of the package keeps its traceback


def test_a_closed_output_pipe_is_not_an_error() -> None:
    command = f"{sys.executable} -m pretrain_xla train --help-all | head -1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""


def test_preflight_without_the_compiler_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch_xla', 'jax', 'jaxlib', 'libtpu'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pretrain_xla", "preflight", "--topology", "v5e-8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert done.returncode == 2
    expected = r"error: the package \w+ is not installed: pip install -r requirements-xla_tpu.txt"
    assert re.fullmatch(expected, done.stderr.strip().splitlines()[-1])
