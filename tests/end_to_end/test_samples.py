"""Samples during training: they are taken at the right steps and change neither losses nor graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .conftest import losses, run, summary, torchrun

SAMPLED = {"sample_interval": 8, "sample_prompt": "abc", "tokenizer": "bytes", "vocab_size": 257, "positions": "rotary"}
PLAIN = SAMPLED | {"sample_interval": None, "sample_prompt": None}


def assert_sampled(run_dir: Path) -> None:
    texts = (run_dir / "samples.txt").read_text(encoding="utf-8").split("--- step ")[1:]
    assert [text.splitlines()[0] for text in texts] == ["8", "16", "20"]
    bodies = [text.partition("\n")[2] for text in texts]
    assert all(body.startswith("abc") and len(body) > 10 for body in bodies)
    assert len(set(bodies)) == 3, "the model changes, and so does what it writes"


def sample_on_xla(run_dir: Path, arguments: list[str], devices: int) -> None:
    extra = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    done = run("run_pretrain_xla.py", *arguments, "--strict-graph", **extra)
    assert done.status == 0, done.errors
    assert_sampled(run_dir)
    counts = summary(run_dir)
    assert counts["graphs"] == {"train": 1, "validation": 1, "prefill": 1, "decode": 1, "other": 0}
    assert counts["recompilations"] == counts["unplanned_host_transfers"] == 0


def test_on_xla(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    sample_on_xla(tmp_path / "sampled", flags(tmp_path / "sampled", **SAMPLED), devices=1)
    done = run("run_pretrain_xla.py", *flags(tmp_path / "plain", **PLAIN), PJRT_DEVICE="CPU")
    assert done.status == 0, done.errors
    assert losses(tmp_path / "sampled") == losses(tmp_path / "plain"), "bit for bit"


def test_on_a_mesh(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    sample_on_xla(tmp_path, flags(tmp_path, **SAMPLED, mesh_data=2, mesh_fsdp=2, scan_layers=True), devices=4)


def test_on_torch_alone_and_with_ddp(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    for name, changes in (("plain", PLAIN), ("sampled", SAMPLED)):
        done = run("run_pretrain.py", *flags(tmp_path / name, **changes))
        assert done.status == 0, done.errors
    assert_sampled(tmp_path / "sampled")
    assert losses(tmp_path / "sampled") == losses(tmp_path / "plain"), "bit for bit"
    done = torchrun(2, "run_pretrain.py", *flags(tmp_path / "ddp", **SAMPLED))
    assert done.status == 0, done.errors
    assert_sampled(tmp_path / "ddp")


def test_a_tokenizer_that_does_not_match_the_data(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run("run_pretrain.py", *flags(tmp_path, **SAMPLED | {"vocab_size": 200}))
    assert done.status == 2
    assert "sample_interval=8: tokenizer 'bytes' has 257 tokens and the model 200: set --tokenizer" in done.last_error
