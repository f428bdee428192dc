"""Impossible requests end in one clear line and exit status 2, without a stack trace, and nothing is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import VOCAB_SIZE, Result, run, torchrun

XLA = {"PJRT_DEVICE": "CPU"}


def assert_refused(done: Result, *expected: str) -> None:
    assert done.status == 2, done.errors
    lines = [line for line in done.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.errors
    for text in expected:
        assert text in lines[0]
    assert "Traceback" not in done.errors


def test_unknown_key(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model:\n  d_modle: 64\n")
    assert_refused(run("run_pretrain_xla.py", "--config", str(config)), "unknown key 'model.d_modle'", "'d_model'")
    assert_refused(run("run_pretrain.py", "--d-modle", "64"), "unknown argument '--d-modle'", "--d-model")


def test_num_heads_that_does_not_divide_d_model() -> None:
    done = run("run_pretrain_xla.py", "--d-model", "100", "--num-heads", "7")
    assert_refused(done, "d_model=100 is not divisible by num_heads=7")


@pytest.mark.parametrize("exists", [False, True])
def test_missing_or_empty_data_folder(exists: bool, tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    done = run("run_pretrain.py", *flags(tmp_path / "run", train_dir=folder))
    assert_refused(done, str(folder), "no token shards" if exists else "no such folder")


def one_shard(tmp_path: Path, tokens: Any) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "000.npy", np.asarray(tokens, np.uint16))
    return folder


def test_truncated_shard(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    folder = one_shard(tmp_path, np.arange(5000) % 100)
    shard = folder / "000.npy"
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = run("run_pretrain.py", *flags(tmp_path / "run", train_dir=folder))
    assert_refused(done, str(shard), "truncated")


def test_token_id_outside_the_vocabulary(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    folder = one_shard(tmp_path, [*range(100), VOCAB_SIZE] * 50)
    done = run("run_pretrain.py", *flags(tmp_path / "run", train_dir=folder))
    assert_refused(done, "000.npy", f"token id {VOCAB_SIZE}", f"vocab_size={VOCAB_SIZE}")


def test_mesh_that_does_not_fit(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    four = XLA | {"CPU_NUM_DEVICES": "4"}
    done = run("run_pretrain_xla.py", *flags(tmp_path, mesh_fsdp=3), **four)
    assert_refused(done, "fsdp=3", "4 device(s)")
    done = run("run_pretrain_xla.py", *flags(tmp_path, mesh_tensor=4, d_model=36, num_heads=6), **four)
    assert_refused(done, "mesh_tensor=4 does not divide num_heads=6")
    done = run("run_pretrain_xla.py", *flags(tmp_path, train_batch_size=6), **four)
    assert_refused(done, "batch of 6 sequences does not divide over data x fsdp = 4")


def test_multiprocess_on_several_cpu_devices(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    for flag in (["--mp-start-method", "spawn"], ["--ddp"]):
        done = run("run_pretrain_xla.py", *flags(tmp_path), *flag, **XLA, CPU_NUM_DEVICES="2")
        assert_refused(done, "deadlocks", "SPMD")


def test_another_models_checkpoint(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    small = {"train_steps": 2, "save_interval": 2, "warmup_steps": 1}
    assert run("run_pretrain.py", *flags(tmp_path, **small)).status == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*"))
    done = run("run_pretrain.py", *flags(tmp_path, **small, num_layers=3))
    assert_refused(done, "checkpoint of another model", "num_layers is 2, this run's is 3")
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == kept
    done = run("run_pretrain.py", *flags(tmp_path / "b", **small, num_layers=3, from_checkpoint=tmp_path))
    assert_refused(done, "checkpoint of another model")
    data = next((tmp_path / "checkpoints" / "step_00000002").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:200])
    done = run("run_pretrain.py", *flags(tmp_path, **small))
    assert_refused(done, "step_00000002 is damaged", "remove that folder")


def test_unwritable_output(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("run_pretrain.py", *flags(tmp_path / "file" / "run"))
    assert_refused(done, "run_dir=", "cannot be written")


def test_missing_devices(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    assert_refused(run("run_pretrain_xla.py", *flags(tmp_path), PJRT_DEVICE="TPU"), "no TPU", "PJRT_DEVICE=CPU")
    assert_refused(run("run_pretrain_xla.py", *flags(tmp_path), PJRT_DEVICE="NPU"), "unknown device")
    assert_refused(run("run_pretrain_xla.py", *flags(tmp_path), PJRT_DEVICE="CUDA"), "PJRT plugin")
    no_cuda = run("run_pretrain.py", *flags(tmp_path), "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert_refused(no_cuda, "no CUDA device")
    assert_refused(
        run("run_pretrain.py", *flags(tmp_path), "--mixed-precision", "fp16", "--device", "cpu"), "fp16 needs CUDA"
    )


def test_under_torchrun(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = torchrun(2, "run_pretrain.py", *flags(tmp_path, train_batch_size=7, eval_batch_size=8, device="cpu"))
    assert done.status != 0
    assert "error: a batch of 7 sequences does not divide over 2 processes" in done.errors
    assert 'Traceback (most recent call last):\n  File "pretrain' not in done.errors


def test_a_diverging_loss_stops_the_run(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    changes = {"learning_rate": 1e30, "max_grad_norm": 0.0, "log_interval": 1, "save_interval": 1, "warmup_steps": 1}
    done = run("run_pretrain.py", *flags(tmp_path, **changes))
    assert_refused(done, "loss is nan", "--learning-rate")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("loss", 0) == row.get("loss", 0) for row in rows)


OUT_OF_MEMORY = """
import torch, torch_xla
from pretrain_xla.errors import guarded, out_of_memory

@guarded
def compute():
    with out_of_memory("lower --train-batch-size"):
        x = torch.ones(1 << 22, device=torch_xla.device())
        table = torch.cat([(x[:, None] * x[None, :]).reshape(-1)] * 4).sort().values
        torch_xla.sync()
        table[:3].cpu()

compute()
"""


def test_out_of_memory(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run("run_pretrain.py", *flags(tmp_path / "run", d_model=2**20, d_ff=2**20, num_layers=1))
    assert_refused(done, "the host is out of memory", "--train-batch-size", "--rematerialization", "preflight")
    assert not (tmp_path / "run").exists()
    done = run("-c", OUT_OF_MEMORY, **XLA)
    assert_refused(
        done, "the device is out of memory", "allocating 281474976710656 bytes", ": lower --train-batch-size"
    )


def test_variables_left_over_from_torchrun(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run("run_pretrain.py", *flags(tmp_path / "run"), RANK="1")
    assert_refused(done, "RANK=1 is in the environment, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: unset RANK")
    assert not (tmp_path / "run").exists()
