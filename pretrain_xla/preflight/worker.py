"""The process that traces and compiles one step: `python -m pretrain_xla.preflight.worker FOLDER`, started by `client.py`.

torch_xla fixes its number of devices once per process, libtpu may abort it, and both are large: so each compilation has its own
process. FOLDER holds `request.json`; `stage` has the present stage; `compile_result.json` is written at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from pretrain_xla.errors import UserError, missing_package


def work(folder: Path) -> None:
    """Answer the request in a folder."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        result = _compile(folder, request)
    except UserError as error:
        result = {"error": str(error)}
    except ModuleNotFoundError as error:
        if (line := missing_package(error)) is None:
            raise
        result = {"error": line}
    temporary = folder / "compile_result.tmp"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.rename(folder / "compile_result.json")


def _compile(folder: Path, request: dict[str, object]) -> dict[str, object]:
    from pretrain_xla.config import RunConfig
    from pretrain_xla.preflight.compile_result import Compiled, CompileResult, Shortage
    from pretrain_xla.preflight.compiler import INSTALL, compile_step, describe_inputs, input_text, libtpu_version
    from pretrain_xla.preflight.topology import resolve_topology
    from pretrain_xla.runtime.xla.compiler_warnings import in_words, libtpu_log

    libtpu = libtpu_version()
    try:
        from pretrain_xla.preflight.lines import SourceLines
        from pretrain_xla.preflight.trace import trace_step
    except ImportError as error:
        raise UserError(f"{error}; {INSTALL}") from None
    config = RunConfig.model_validate(request["config"])
    topology = resolve_topology(str(request["topology"]))
    options = request["options"]
    assert isinstance(options, dict)
    (folder / "stage").write_text("tracing")
    began = time.perf_counter()
    with SourceLines():
        step = trace_step(config, topology.chip.name)
    traced = time.perf_counter()
    if request["keep_input"]:
        (folder / "input.hlo").write_text(input_text(step), encoding="utf-8")
    (folder / "stage").write_text("compiling")
    answer = compile_step(step, topology, options)
    return CompileResult(
        compiled=answer if isinstance(answer, Compiled) else None,
        shortage=answer if isinstance(answer, Shortage) else None,
        inputs=describe_inputs(step, answer),
        mesh=step.mesh,
        trace_seconds=traced - began,
        compile_seconds=time.perf_counter() - traced,
        libtpu=libtpu,
        detours=in_words(libtpu_log(), "the step"),
    ).to_tree()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    sys.stdout.flush()
    # Exit at once: the XLA runtimes of two libraries take seconds to shut down together, and sometimes abort.
    os._exit(0)
