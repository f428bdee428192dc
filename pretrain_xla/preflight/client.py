"""Compiles a step in a separate process, from a process that loads neither torch_xla nor JAX."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pretrain_xla
from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.preflight.compile_result import CompileResult
from pretrain_xla.preflight.topology import Topology
from pretrain_xla.runtime.xla.environment import CHANGES_RESULTS, compiler_options

ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "XLA_IR_DEBUG": "1",
    "XLA_HLO_DEBUG": "1",
    # Do not open a TPU, ask a metadata server, or wait for another process's lock on libtpu.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TPU_STDERR_LOG_LEVEL": "2",
    "TPU_MIN_LOG_LEVEL": "1",  # warnings go to a file, which is read
}
"""Environment in which torch_xla and libtpu are loaded."""

STALE = (
    *(
        "CLOUD_TPU_TASK_ID",
        "TPU_PROCESS_ADDRESSES",
        "TPU_VISIBLE_CHIPS",
        "LIBTPU_INIT_ARGS",
        "XLA_FLAGS",
        "XLA_USE_SPMD",
    ),
    *CHANGES_RESULTS,
)
"""Variables that describe another run, and would change the result."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to compile. options: compiler options by name, in addition to the run's. save: folder for the HLO. None means
    that it is not saved."""

    config: RunConfig
    topology: Topology
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    save: Path | None = None

    @property
    def all_options(self) -> dict[str, str]:
        """All compiler options."""
        return compiler_options(self.config.parallel) | dict(self.options)


def compile_request(request: Request, tick: Callable[[str], None] = lambda stage: None) -> CompileResult:
    """Trace and compile a step; `tick` is called a few times a second with the present stage.

    Raises:
        UserError: the step cannot be built or compiled, for another reason than its size.
    """
    with tempfile.TemporaryDirectory(prefix="preflight-") as name:
        folder = Path(name)
        _write_request(folder, request)
        status = _run(folder, request.topology.devices, tick)
        answer = folder / "compile_result.json"
        if not answer.exists():
            errors = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            # libtpu marks its last message with F, for fatal; what follows is about its core dump.
            fatal = [line for line in errors if re.match(r"F\d{4} ", line)]
            last = " | ".join(line.strip() for line in (fatal or errors[-4:])) or "without a message"
            raise UserError(f"the process that compiles ended with status {status}: {last[-1500:]}")
        tree = json.loads(answer.read_text(encoding="utf-8"))
        if "error" in tree:
            raise UserError(tree["error"])
        result = CompileResult.from_tree(tree)
        if request.save is not None:
            _save(folder, request, result)
        return result


def _write_request(folder: Path, request: Request) -> None:
    tree = {
        "config": request.config.model_dump(mode="json"),
        "topology": request.topology.name,
        "options": request.all_options,
        "keep_input": request.save is not None,
    }
    (folder / "request.json").write_text(json.dumps(tree), encoding="utf-8")


def _run(folder: Path, devices: int, tick: Callable[[str], None]) -> int:
    root = str(Path(pretrain_xla.__file__).resolve().parents[1])
    kept = {key: value for key, value in os.environ.items() if key not in STALE}
    path = os.pathsep.join(part for part in (root, kept.get("PYTHONPATH")) if part)
    environment = kept | ENVIRONMENT | {"CPU_NUM_DEVICES": str(devices), "PYTHONPATH": path}
    environment["TPU_LOG_DIR"] = str(folder)
    command = [sys.executable, "-m", "pretrain_xla.preflight.worker", str(folder)]
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            while (status := process.poll()) is None:
                stage = folder / "stage"
                tick(stage.read_text() if stage.exists() else "starting")
                time.sleep(0.2)
            return status
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _save(folder: Path, request: Request, result: CompileResult) -> None:
    assert request.save is not None
    try:
        request.save.mkdir(parents=True, exist_ok=True)
        (request.save / "input.hlo").write_bytes((folder / "input.hlo").read_bytes())
        if result.compiled:
            (request.save / "optimised.hlo").write_text(result.compiled.hlo_text, encoding="utf-8")
        if result.shortage:
            (request.save / "out_of_memory.txt").write_text(result.shortage.message, encoding="utf-8")
        options = {
            "topology": request.topology.libtpu_name,
            "topology_options": request.topology.libtpu_options,
            "mesh": result.mesh,
            "num_partitions": request.topology.devices,
            "env_option_overrides": request.all_options,
            "libtpu": result.libtpu,
        }
        (request.save / "options.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--save-hlo {request.save}: cannot be written ({error.strerror}): name another folder"
        ) from None
