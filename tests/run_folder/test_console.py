"""Terminal output of a run: only the main process prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.model import parameter_count
from pretrain_xla.run_folder.console import Console
from pretrain_xla.runtime.launched import launched
from pretrain_xla.runtime.torch_runtime import TorchRuntime

Make = Callable[..., RunConfig]
SUMMARY: dict[str, Any] = {
    "first_valid_loss": 9.0,
    "last_valid_loss": 5.5,
    "best_valid_loss": 5.0,
    "graphs": {"train": 1, "validation": 1},
    "tokens": 1_234_567,
    "steps": 20,
    "seconds": 61.4,
    "tokens_per_second": 3500.0,
    "mfu": 0.415,
    "skipped_updates": 2,
    "goodput": 0.875,
    "starts": 2,
    "wall_seconds": 1100.4,
    "wall_seconds_in": {"steps": 962.9, "first step": 60.0, "validation": 0.4, "lost": 77.1},
    "compile_seconds": 7.0,
    "recompilations": 0,
    "host_fallbacks": 0,
    "unplanned_host_transfers": 3,
}


def print_everything(console: Console, config: RunConfig, runtime: TorchRuntime) -> None:
    console.print("a line")
    console.note("a [bold]note[/bold]")
    console.warn("a warning " + "that is long " * 20)
    console.header(config, runtime, 5)
    console.validation({"step": 20, "valid_loss": 5.5, "valid_perplexity": 244.69})
    with console.progress("evaluating", 2) as advance:
        advance(2)
    with console.training(5, 20) as bar:
        bar.advance(6)
        bar.show({"step": 6, "loss": 5.25, "grad_norm": 0.5, "learning_rate": 3e-4, "tokens_per_second": 3500.0})
        bar.show({"step": 8, "loss": 5.0, "grad_norm": 0.5, "learning_rate": 3e-4})
    console.summary(SUMMARY, "runs/x")


def test_lines_are_not_wrapped_in_a_log(
    make_config: Make,
    runtime: TorchRuntime,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # wide enough for the summary's table; lines are not wrapped at any width
    config = make_config(model={"vocab_size": 5000})
    print_everything(Console(enabled=True), config, runtime)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "\x1b" not in printed.out, "no colour codes where there is no terminal"
    assert "a line" in lines
    assert "note: a [bold]note[/bold]" in lines
    assert "warning: a warning " + "that is long " * 20 in lines
    header = next(line for line in lines if "parameters on" in line)
    assert header.startswith(f"{parameter_count(config.model) / 1e6:.2f}M parameters on 1 x CPU (torch, data 1, fp32)")
    assert "steps 5 to 2, 32 tokens each" in header
    assert header.endswith(f"files in {config.run_dir}")
    assert "attention: PyTorch's fused kernels" in lines
    assert "step     20  validation loss 5.5000  perplexity 244.69" in lines
    assert "step      6/20  loss 5.2500  norm 0.50  rate 3.00e-04  3,500 tokens/s" in lines
    assert "step      8/20  loss 5.0000  norm 0.50  rate 3.00e-04" in lines
    for part in (
        "1,234,567 in 20 steps, 61 s",
        "first 9.0000, last 5.5000, best 5.0000",
        "3,500 tokens/s, 41.5% of peak",
        "train 1, validation 1; 7 s",
        "3 unplanned host transfers",
        "87.5% of 1,100 s in 2 starts; lost 77 s, first step 60 s",
        "runs/x",
    ):
        assert part in printed.out


def test_a_run_without_validation_or_rate_has_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("first_valid_loss", "last_valid_loss", "best_valid_loss", "tokens_per_second", "mfu")
    Console(enabled=True).summary(SUMMARY | dict.fromkeys(keys) | {"graphs": {}}, "runs/x")
    text = capsys.readouterr().out
    assert "validation loss" not in text
    assert "tokens/s" not in text
    assert "none; 7 s" in text


def test_processes_that_are_not_main_print_nothing(
    make_config: Make, runtime: TorchRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(enabled=False)
    print_everything(console, make_config(), runtime)
    assert not console.is_terminal
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize(
    ("ranks", "hosts"),
    [({}, 1), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 1), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 4)],
)
def test_hosts_under_torchrun(ranks: dict[str, str], hosts: int) -> None:
    others = {"RANK": "0", "MASTER_ADDR": "a.host", "MASTER_PORT": "29500"} if ranks else {}
    assert launched(others | ranks).hosts == hosts
