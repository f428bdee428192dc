"""Running out of memory (by real allocations that fail) or of open files is a one-line error."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain_xla.errors import UserError, guarded, out_of_memory
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.generate.command import generate_command
from pretrain_xla.system_faults import memory_fault, raise_file_limit, reason
from pretrain_xla.train.run import run

# The messages of libtpu, XLA's runtime and CUDA.
AT_COMPILE_TIME = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.45G of 15.75G hbm. "
    "Exceeded hbm capacity by 5.70G.\n\nTotal hbm usage >= 21.70G:\n"
)
AT_RUN_TIME = "Bad StatusOr access: RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.00G."
CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 3.06 MiB is free."


def allocate_with_torch() -> None:
    torch.empty(2**58, dtype=torch.uint8)


def allocate_with_numpy() -> None:
    np.ones(2**58, np.uint8)


def raises(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (allocate_with_torch, "the host is out of memory"),
        (allocate_with_numpy, "the host is out of memory (Unable to allocate"),
        (raises(MemoryError()), "the host is out of memory"),
        (raises(OSError(errno.ENOMEM, "Cannot allocate memory")), "the host is out of memory"),
        (raises(RuntimeError(AT_COMPILE_TIME)), "the device is out of memory (RESOURCE_EXHAUSTED: XLA:TPU compile"),
        (raises(RuntimeError(AT_RUN_TIME)), "the device is out of memory (Bad StatusOr access"),
        (raises(ValueError(AT_RUN_TIME.removeprefix("Bad StatusOr access: "))), "the device is out of memory"),
        (raises(torch.OutOfMemoryError(CUDA)), "the device is out of memory (CUDA out of memory. Tried"),
        (raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")), "the device is"),
    ],
)
def test_running_out_of_memory_is_one_line(
    call: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught, out_of_memory("lower --x"):
        call()
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(": lower --x")
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as left:
        guarded(call)()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_other_errors_keep_their_traceback() -> None:
    for error in (RuntimeError("a defect"), ValueError("shape"), OSError(errno.EIO, "Input/output error")):
        assert memory_fault(error) is None
        with pytest.raises(type(error)), out_of_memory("lower --x"):
            raise error
        with pytest.raises(type(error)):
            guarded(raises(error))()


def test_the_systems_message_is_found_behind_a_librarys() -> None:
    error = RuntimeError("unexpected pos 704 vs 598")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert reason(error) == "No space left on device"
    assert reason(RuntimeError("message\nof a trace")) == "message"


@pytest.mark.parametrize(
    ("command", "target", "flags"),
    [
        (evaluate_command, "pretrain_xla.evaluate.command.load_model", ("--batch-size", "--mesh-fsdp")),
        (generate_command, "pretrain_xla.generate.command.Generator.load", ("--num-samples", "--max-new-tokens")),
    ],
)
def test_each_command_names_the_flags_that_help(
    command: Callable[[list[str]], None], target: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, lambda *_, **__: allocate_with_torch())
    arguments = ["--model", "x"] + (["--tasks", "lambada"] if command is evaluate_command else ["--prompt", "a"])
    with pytest.raises(UserError, match="the host is out of memory") as caught:
        command(arguments)
    assert all(flag in str(caught.value) for flag in (*flags, "preflight"))


def test_training_names_the_flags_that_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pretrain_xla.config import build_config

    monkeypatch.setattr("pretrain_xla.train.run.start", lambda *_: allocate_with_torch())
    config = build_config({"parallel": {"runtime": "torch"}, "logging": {"run_dir": str(tmp_path / "run")}}, "test")
    with pytest.raises(UserError) as caught:
        run(config)
    names = ("--train-batch-size", "--gradient-accum-step", "--rematerialization", "--loss-chunk", "--mesh-fsdp")
    assert all(name in str(caught.value) for name in (*names, "preflight"))
    assert not (tmp_path / "run").exists()


def test_open_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = tmp_path / "000.npy"
    np.save(path, np.arange(9, dtype=np.uint16))
    opened = []

    def open_too_many() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        opened.extend(np.memmap(path, np.uint16, mode="r") for _ in range(64))

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        guarded(lambda: opened.extend(np.memmap(path, np.uint16, mode="r") for _ in range(64)))()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64, "raised to what the system allows"
        opened.clear()
        with pytest.raises(SystemExit):
            guarded(open_too_many)()
    finally:
        opened.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files: raise the limit for this shell (ulimit -n 65536)\n" in capsys.readouterr().err
    raise_file_limit()


def test_ctrl_c_gives_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        guarded(interrupted)()
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
