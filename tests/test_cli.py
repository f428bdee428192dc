"""From arguments to one call: errors are one line and exit status 2, and a flag without effect gives a note."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain_xla import __version__, cli
from pretrain_xla.errors import Interrupted, UserError
from pretrain_xla.flags import parse_flags

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the package's command line; returns (status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status: object = 0
        try:
            cli.main(arguments)
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        assert isinstance(status, int)
        return status, printed.out, printed.err

    return run


def assert_refused(result: tuple[int, str, str], *expected: str) -> None:
    status, out, err = result
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for part in expected:
        assert part in err
    assert out == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments: list[str], run: Run) -> None:
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    for command in ("train", "prepare", "train-tokenizer", "generate", "evaluate", "lm-eval", "quickstart"):
        assert f"\n  {command} " in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "hint"),
    [("trian", "did you mean train?"), ("--train", "did you mean train?"), ("inspct", "mean inspect?"), ("", "--help")],
)
def test_unknown_command(command: str, hint: str, run: Run) -> None:
    assert_refused(run(command), f"unknown command {command!r}", hint)


def test_a_config_without_its_folder_gets_a_suggestion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for named in ("modern_124m.yaml", "configs/modern_124m", "config/modern-124m.yml"):
        assert_refused(
            run("train", "--config", named), f"--config {named}: no such file; did you mean configs/modern_124m.yaml?"
        )


def test_refusals_of_train(run: Run, tmp_path: Path) -> None:
    assert_refused(run("train", "--d-modle", "64"), "'--d-modle'", "--d-model")
    assert_refused(run("train", "--num-heads", "7"), "d_model=768", "num_heads=7")
    assert_refused(run("train", "--config", str(tmp_path / "no.yaml")), "no.yaml", "no such file")
    (tmp_path / "c.yaml").write_text("model: {d_modle: 64}")
    assert_refused(run("train", "--config", str(tmp_path / "c.yaml")), "c.yaml", "'model.d_modle'", "'d_model'")


@pytest.mark.parametrize("command", ["train", "prepare", "train-tokenizer", "generate", "evaluate", "quickstart"])
def test_every_command_has_help(command: str, run: Run) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "usage" in out.lower()


def test_a_run_without_data_is_refused(run: Run, tmp_path: Path) -> None:
    flags = ["--runtime", "torch", "--device", "cpu", "--run-dir", str(tmp_path / "run"), "--train-dir"]
    assert_refused(
        run("train", *flags, str(tmp_path / "none"), "--valid-dir", str(tmp_path / "none")), "no such folder"
    )


def test_guarded_keeps_the_traceback_of_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.guarded
    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError("a defect"))
    with pytest.raises(SystemExit) as refused:
        fails(UserError("the message"))
    assert refused.value.code == 2
    assert capsys.readouterr().err == "error: the message\n"
    with pytest.raises(SystemExit) as stopped:
        fails(Interrupted("stopped at step 3", signal.SIGTERM))
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "stopped at step 3\n"


@pytest.mark.parametrize("runtime", ["torch", "xla"])
def test_each_training_script_sets_its_runtime(
    runtime: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--print-config"])
    cli.run_pretrain(runtime)
    assert f"\n  runtime: {runtime}\n" in capsys.readouterr().out


def notes(*arguments: str) -> list[str]:
    parsed = parse_flags(arguments, program="script.py", description="A script.")
    return cli.unused_flags(parsed.config, parsed.given)


# (flags without effect, the flag and the reason in its line, flags with which it has one)
EFFECTLESS: list[tuple[str, str, str, str]] = [
    ("--compile", "--compile", "xla runtime always compiles", "--compile --runtime torch"),
    ("--device cpu", "--device", "PJRT_DEVICE", "--device cpu --runtime torch"),
    ("--ddp-backend gloo", "--ddp-backend", "torch runtime", "--ddp-backend gloo --runtime torch"),
    ("--mp-start-method spawn --runtime torch", "--mp-start-method", "torchrun", "--mp-start-method spawn"),
    ("--ddp --runtime torch", "--ddp", "torchrun", "--ddp"),
    ("--mesh-data 2 --runtime torch", "--mesh-data", "torchrun", "--mesh-data 2"),
    ("--strict-graph --runtime torch --device cpu", "--strict-graph", "--compile", "--strict-graph --runtime torch"),
    (
        *("--strict-graph --runtime torch --device cpu", "--strict-graph", "--compile"),
        "--strict-graph --runtime torch --device cpu --compile",
    ),
    ("--use-syncfree-optim", "--use-syncfree-optim", "never synchronises", "--seed 1"),
    ("--cooldown-steps 5", "--cooldown-steps", "wsd", "--cooldown-steps 5 --decay-method wsd"),
    (
        *(
            "--cooldown-steps 5 --cooldown-fraction 0.5 --decay-method wsd",
            "--cooldown-steps",
            "--cooldown-fraction is given",
        ),
        "--cooldown-fraction 0.5 --decay-method wsd",
    ),
    ("--cooldown-fraction 0.5", "--cooldown-fraction", "wsd", "--cooldown-fraction 0.5 --decay-method wsd"),
    ("--min-lr 0 --min-lr-fraction 0", "--min-lr", "--min-lr-fraction is given", "--min-lr-fraction 0"),
    ("--min-lr-fraction 0 --decay-method noam", "--min-lr-fraction", "does not use it", "--min-lr-fraction 0"),
    ("--muon-momentum 0.9", "--muon-momentum", "--optim-type muon", "--muon-momentum 0.9 --optim-type muon"),
    ("--cautious-weight-decay", "--cautious-weight-decay", "muon", "--cautious-weight-decay --optim-type muon"),
    ("--head-learning-rate 1 --tie-weights", "--head-learning-rate", "--tie-weights", "--head-learning-rate 1"),
    ("--min-lr 0 --decay-method noam", "--min-lr", "does not use it", "--min-lr 0"),
    ("--min-lr 0 --decay-method constant", "--min-lr", "does not use it", "--min-lr 0 --decay-method linear"),
    ("--decay-steps 9 --decay-method noam", "--decay-steps", "does not use it", "--decay-steps 9000"),
    (
        "--decay-steps 9 --decay-method constant",
        "--decay-steps",
        "does not use it",
        "--decay-steps 9000 --decay-method wsd",
    ),
    ("--eval-interval 5", "--eval-interval", "--eval-tasks is not given", "--eval-interval 5 --eval-tasks piqa"),
    ("--eval-tasks piqa --do-test", "--eval-tasks", "evaluate.py", "--eval-tasks piqa"),
    ("--eval-limit 5", "--eval-limit", "--eval-tasks is not given", "--eval-limit 5 --eval-tasks piqa"),
    ("--scan-layers --runtime torch", "--scan-layers", "only the xla runtime", "--scan-layers"),
    ("--overlap-gradients --runtime torch", "--overlap-gradients", "TPU compiler", "--overlap-gradients"),
    ("--compile-cache x --runtime torch", "--compile-cache", "xla runtime", "--compile-cache x"),
    ("--topology v5e-8", "--topology", "preflight", "--topology v5e-8 --preflight-only"),
    ("--sample-prompt x", "--sample-prompt", "--sample-interval", "--sample-prompt x --sample-interval 5"),
    ("--end-of-text 5", "--end-of-text", "--separate-documents", "--end-of-text 5 --separate-documents"),
    ("--rope-theta 1e6", "--rope-theta", "--positions rotary", "--rope-theta 1e6 --positions rotary"),
    ("--wandb-name x", "--wandb-name", "--wandb-logging is not given", "--wandb-name x --wandb-logging"),
]


@pytest.mark.parametrize(("useless", "flag", "reason", "useful"), EFFECTLESS)
def test_a_flag_without_effect_gives_a_note(useless: str, flag: str, reason: str, useful: str) -> None:
    lines = notes(*useless.split())
    assert len(lines) == 1
    assert lines[0].startswith(f"{flag} has no effect: ")
    assert reason in lines[0]
    assert notes(*useful.split()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--train-steps 5000", "does not reach min_lr; with --decay-steps 5000 both end"),
        ("--train-steps 30000", "the last 10,000 steps run at min_lr; with --decay-steps 30000 both end"),
        ("--train-steps 5000 --decay-method wsd", "does not reach min_lr"),
        ("--train-steps 5000 --decay-steps 5000", None),
        ("--train-steps 5000 --decay-method constant", None),
        ("--train-steps 5000 --do-test", None),
        ("", None),
    ],
)
def test_a_schedule_that_does_not_end_with_the_run_gives_a_note(arguments: str, expected: str | None) -> None:
    lines = cli.schedule_notes(parse_flags(arguments.split(), program="script.py", description="A script.").config)
    assert len(lines) == (expected is not None)
    assert all(str(expected) in line for line in lines)


def test_only_flags_that_were_given_get_a_note() -> None:
    assert notes() == []
    assert notes("--runtime", "torch") == []
    lines = notes(*"--wandb-name x --wandb-project y --compile --seed 3".split())
    assert len(lines) == 2
    assert "--wandb-name, --wandb-project" in lines[1]


def _make(python: str, tmp_path: Path) -> str:
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert not (tmp_path / "venv").exists()
    return done.stderr.splitlines()[0]


def test_an_unsupported_python_is_refused_with_the_fix(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.10.12";; *) exit 1;; esac\n')
    old.chmod(0o755)
    assert _make(str(old), tmp_path).startswith("error: Python 3.10.12 does not fit; Python 3.11 to 3.13 is needed")
    assert "uv python install 3.11" in _make("missing-python", tmp_path)
    script = "import sys; sys.version_info = (3, 10, 12, 'final', 0); import pretrain_xla"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "uv venv --python 3.11" in done.stderr
