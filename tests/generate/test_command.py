"""Command-line interface of `generate.py`: its flags, prompts from flags, files and pipes, and errors in one line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from pretrain_xla.cli import main
from pretrain_xla.errors import UserError
from pretrain_xla.generate.command import generate_command

HERE = ["--runtime", "torch", "--device", "cpu"]


def test_the_originals_flags_word_for_word(tmp_path: Path) -> None:
    flags = "--tokenizer gpt2 --seed 1 --temperature 0.8 --max-new-tokens 5 --top-k 40 --top-p 0.95".split()
    with pytest.raises(UserError, match="no such file or folder"):  # so the words were all understood
        generate_command(["--model", str(tmp_path / "none"), *flags])


def test_a_prompt_on_the_command_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.txt"
    flags = ["--model", str(run_dir), "--prompt", "abc", "--max-new-tokens", "9", *HERE]
    generate_command([*flags, "--output", str(output)])
    printed = capsys.readouterr().out
    assert printed.startswith("abc")
    assert len(printed) > 4
    assert output.read_text(encoding="utf-8") == printed
    generate_command(flags)
    assert capsys.readouterr().out == printed, "the seed has a default"
    generate_command([*flags, "--seed", "43"])
    assert capsys.readouterr().out != printed
    generate_command([*flags, "--checkpoint", "best", "--temperature", "0"])
    best = capsys.readouterr().out
    generate_command([*flags, "--temperature", "0"])
    assert capsys.readouterr().out != best


def test_prompts_from_a_pipe(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(run_dir), "--max-new-tokens", "4", "--temperature", "0", *HERE]
    generate_command([*flags, "--prompt", "abc"])
    one = capsys.readouterr().out
    generate_command([*flags, "--prompt", "xyz"])
    other = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n\n  \nxyz"))
    generate_command(flags)
    assert capsys.readouterr().out == one + other


def test_several_prompts_samples_and_stops(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(run_dir), "--max-new-tokens", "8", *HERE]
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nxyz\n", encoding="utf-8")
    generate_command([*flags, "--prompt-file", str(file), "--num-samples", "2"])
    lines = capsys.readouterr().out.split("--- ")[1:]
    assert [line.splitlines()[0] for line in lines] == [f"{number} of 4" for number in range(1, 5)]
    texts = [line.partition("\n")[2] for line in lines]
    assert [text[:3] for text in texts] == ["abc", "abc", "xyz", "xyz"]
    assert texts[0] != texts[1]
    generate_command([*flags, "--prompt", "abc", "--prompt", "abc", "--prompt", "xyz", "--prompt", "xyz", "--no-cache"])
    assert capsys.readouterr().out.split("--- ")[1:] == lines

    greedy = ["--prompt", "abc", "--temperature", "0"]
    generate_command([*flags, *greedy])
    whole = capsys.readouterr().out.rstrip("\n")
    generate_command([*flags, *greedy, "--stop", whole[5:7]])
    assert capsys.readouterr().out == whole[: whole.index(whole[5:7], 3)] + "\n"


def test_a_prompt_file_of_windows_and_one_with_other_line_separators(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffabc\r\nx\u2028y\x85z\r\n".encode())
    generate_command(["--model", str(run_dir), "--max-new-tokens", "2", "--prompt-file", str(file), *HERE])
    printed = capsys.readouterr().out
    assert printed.startswith("--- 1 of 2\nabc")
    assert "--- 2 of 2\nx\u2028y\x85z" in printed


def test_shown_tokens_end_at_a_stop(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(run_dir), "--max-new-tokens", "8", "--prompt", "abc", "--temperature", "0", *HERE]
    generate_command(flags)
    whole = capsys.readouterr().out.rstrip("\n")
    generate_command([*flags, "--show-tokens"])
    every = capsys.readouterr().out.rstrip("\n")
    generate_command([*flags, "--show-tokens", "--stop", whole[5:7]])
    shown = capsys.readouterr().out.rstrip("\n")
    assert every.startswith(shown)
    assert shown.count("] [") < every.count("] [")


def test_tokens_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_command(["--model", str(run_dir), "--max-new-tokens", "5", "--prompt", "ab", "--show-tokens", *HERE])
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("[97 'a'] [98 'b'] [")
    assert shown.count("[") >= 7
    first = int(shown.split("] [")[2].split()[0])
    generate_command(["--model", str(run_dir), "--prompt", "ab", "--stop-token", str(first), *HERE])
    assert capsys.readouterr().out == "ab\n"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["generate", *arguments])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_faults_end_in_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(run_dir), *HERE]
    assert "no such file or folder" in refusal(["--model", str(tmp_path / "none"), *HERE], capsys)
    assert "--temperature -1.0 is negative" in refusal([*model, "--temperature", "-1"], capsys)
    assert "--top-p 2.0 is outside" in refusal([*model, "--top-p", "2"], capsys)
    assert "--top-k -2 is negative" in refusal([*model, "--top-k", "-2"], capsys)
    assert "--num-samples 0: ask for at least 1" in refusal([*model, "--num-samples", "0"], capsys)
    for stop in ("9999999999", "-1"):
        assert f"--stop-token {stop}: the model's tokens are 0 to " in refusal([*model, "--stop-token", stop], capsys)
    assert "--stop ''" in refusal([*model, "--prompt", "a", "--stop", ""], capsys)
    assert "--prompt-file" in refusal([*model, "--prompt-file", str(tmp_path / "none.txt")], capsys)
    assert "'klingon'" in refusal([*model, "--prompt", "a", "--tokenizer", "klingon"], capsys)


def test_an_output_that_cannot_be_written(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "none" / "out.txt")
    flags = ["--model", str(run_dir), "--prompt", "a", "--max-new-tokens", "1", *HERE]
    assert output in refusal([*flags, "--output", output], capsys)


def test_the_model_is_required() -> None:
    with pytest.raises(UserError, match="missing: --model"):
        generate_command([])
